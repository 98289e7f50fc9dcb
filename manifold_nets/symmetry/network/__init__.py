"""The network that is analysed: its float64 twin, its aten graph, its modules as a reader knows them."""
