"""What was found, as frozen data with a readable text and a JSON form."""
