"""Tables as Markdown and as LaTeX, whatever the names in them hold."""

from __future__ import annotations

import re

from manifold_nets.comparison.report.tables import Table

__all__ = ["latex", "markdown", "markdown_text"]


def markdown(table: Table) -> str:
    r"""The table in Markdown.

    Example:
        >>> print(markdown(Table("", ("optimizer", "error"), (("sgd", "2 | <3>"),))))
        | optimizer | error |
        |---|---|
        | sgd | 2 \| &lt;3&gt; |
    """
    lines = [table.head, *table.rows]
    text = ["| " + " | ".join(markdown_text(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(table.head), *text[1:]])


def markdown_text(text: str) -> str:
    r"""A text that Markdown shows as it is: no HTML, no links, no code.

    Example:
        >>> print(markdown_text("<b>[a](b)`"))
        &lt;b&gt;[a]\(b)\`
    """
    shown = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"`|(?<=\])\(", r"\\\g<0>", shown)


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "−": "$-$",
        "±": r"$\pm$",
        "×": r"$\times$",
        "≥": r"$\ge$",
        "∞": r"$\infty$",
        "–": "--",
        "…": r"\dots{}",
    }
)


def latex(table: Table, label: str) -> str:
    r"""The table in LaTeX, for the packages ``booktabs`` and, as rows may be wide, ``graphicx``.

    Args:
        table: the table.
        label: what ``\ref`` finds it by, behind ``tab:``.

    Example:
        >>> print(latex(Table("Errors", ("optimizer", "error"), (("sgd_1", "2 %"),)), "errors"))
        \begin{table}
        \centering
        \caption{Errors.}
        \label{tab:errors}
        \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%
        \begin{tabular}{ll}
        \toprule
        optimizer & error \\
        \midrule
        sgd\_1 & 2 \% \\
        \bottomrule
        \end{tabular}}
        \end{table}
    """
    head, *rows = (" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in (table.head, *table.rows))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{table.caption.translate(_LATEX)}.}}",
            rf"\label{{tab:{label}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * len(table.head)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )
