"""The pictures of an answer, with plotly."""

import html

import pandas as pd

from pertstate.app.answers import Answer
from pertstate.base.printable import printable


SHOWN_GENES = 20
# Colours that people with any colour vision tell apart (Okabe & Ito 2008).
_UP, _DOWN, _CONTROL, _PREDICTED = "#d55e00", "#0072b2", "#999999", "#d55e00"
_LAYOUT = {
    "template": "simple_white",
    "margin": {"l": 10, "r": 10, "t": 40, "b": 40},
    "font": {"family": "system-ui, sans-serif"},
}


def shown(name: str, most: int = 40) -> str:
    """A name from data in a picture: plotly reads some markup in texts, so it is escaped."""
    text = printable(name)
    return html.escape(text if len(text) <= most else text[: most - 1] + "…", quote=False)


def change_picture(answer: Answer):
    """The genes with the largest predicted changes as bars with their 95 % intervals, largest on top."""
    import plotly.graph_objects as go

    table = answer.changes.head(SHOWN_GENES)[::-1]
    figure = go.Figure(
        go.Bar(
            x=table["change"].tolist(),
            # Two long names may be shown alike, so the place of a bar is its number.
            y=list(range(len(table))),
            orientation="h",
            marker_color=[_UP if change > 0 else _DOWN for change in table["change"]],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": (table["change_high"] - table["change"]).clip(lower=0).tolist(),
                "arrayminus": (table["change"] - table["change_low"]).clip(lower=0).tolist(),
                "color": "#555555",
                "thickness": 1,
            },
            customdata=[shown(gene) for gene in table["gene"]],
            hovertemplate="%{customdata}: %{x:.4g}<extra></extra>",
        )
    )
    names = [shown(gene, 24) for gene in table["gene"]]
    figure.update_layout(
        **_LAYOUT,
        title=f"Largest changes: {shown(answer.perturbation)} in {shown(answer.context)}",
        xaxis_title="predicted mean change from control (95 % interval)",
        yaxis={"tickmode": "array", "tickvals": list(range(len(table))), "ticktext": names, "automargin": True},
        height=520,
    )
    return figure


def place_picture(places: pd.DataFrame, umap: bool):
    """
    Control cells and predicted cells in two dimensions, and the way from the middle of the former to that of the latter.

    Args:
        places (`pandas.DataFrame`): see [`places_of`].
        umap (`bool`): whether these are places of UMAP; if not, principal components.
    """
    import plotly.graph_objects as go

    figure, middles = go.Figure(), {}
    for kind, colour, symbol in (("control", _CONTROL, "circle"), ("predicted", _PREDICTED, "cross")):
        of = places[places["kind"] == kind]
        middles[kind] = (float(of["x"].mean()), float(of["y"].mean()))
        figure.add_trace(
            go.Scatter(
                x=of["x"].round(4).tolist(),
                y=of["y"].round(4).tolist(),
                mode="markers",
                name=kind,
                marker={"color": colour, "symbol": symbol, "size": 5, "opacity": 0.6},
                hoverinfo="name",
            )
        )
    (x0, y0), (x1, y1) = middles["control"], middles["predicted"]
    figure.add_annotation(
        x=x1, y=y1, ax=x0, ay=y0, xref="x", yref="y", axref="x", ayref="y", showarrow=True, arrowhead=3, arrowwidth=2
    )
    axis = "UMAP" if umap else "principal component"
    figure.update_layout(
        **_LAYOUT, title="Cells before and after", xaxis_title=f"{axis} 1", yaxis_title=f"{axis} 2", height=520
    )
    return figure
