"""The page, built with gradio: what people see and press. What it says and shows is made elsewhere in this folder."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import gradio as gr
from gradio import processing_utils

from pertstate.app.answers import MOST_CELLS, Answer, Question, answer, cell_places, doses_of, perturbations_of
from pertstate.app.cells import Reading, look_at
from pertstate.app.pictures import change_picture, place_picture
from pertstate.app.texts import answer_html, error_html, found_html, model_html
from pertstate.base.input_errors import ERRORS
from pertstate.base.printable import printable
from pertstate.hub.trained import TrainedModel


OWN = "my own file"
PCA, UMAP = "principal components", "UMAP (some seconds more)"
# Rows of the table of genes.
_ROWS = 100
# Uploads and downloads that are older than this many seconds are removed, looked for this often.
_LOOK, _OLD = 600, 4 * 3600
# The questions of all users are answered one after another: they share one model.
_ONE_BY_ONE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
CSS = """
.problem { color: #b3261e; border-left: .3rem solid #b3261e; padding: .3rem .6rem; overflow-wrap: anywhere; }
.said { overflow-wrap: anywhere; }
"""
_KEYS = {
    "perturbation_key": "column with the perturbation",
    "context_key": "column with the context (cell type or line)",
    "batch_key": "column with the batch",
    "control": "what control cells are called",
}


def theme() -> gr.themes.Base:
    """A theme with the fonts of the system: those of gradio's own are asked from another server."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(**fonts)


def page(trained: TrainedModel, cells: Path | None, folder: Path, most_uploaded: int) -> gr.Blocks:
    """
    The page of a model.

    Args:
        trained ([`TrainedModel`]): the model.
        cells (`Path`, *optional*): control cells that everybody may use.
        folder (`Path`): where predicted cells are kept, each answer in a folder of its own.
        most_uploaded (`int`): the largest file that somebody may upload, in MB; `launch` has to enforce it.
    """
    processor, known = trained.processor, perturbations_of(trained)
    title = printable(trained.name)
    with gr.Blocks(title=f"{title} · pertstate", analytics_enabled=False, delete_cache=(_LOOK, _OLD)) as blocks:
        kept = gr.State(None, time_to_live=_OLD, delete_callback=forget)
        gr.HTML(f"<h1>{_escaped(title)}</h1><p>How cells respond to a perturbation, as this model predicts it.</p>")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                own = [] if cells is None else [cells.name]
                source = gr.Radio([*own, OWN], value=(own or [OWN])[0], label="control cells", visible=bool(own))
                upload = gr.File(
                    file_types=[".h5ad"],
                    type="filepath",
                    label=f"an .h5ad with control cells, at most {most_uploaded:,} MB",
                    visible=not own,
                    height=120,
                    elem_id="upload",
                )
                with gr.Accordion("How the file is to be read", open=False, visible=not own) as how:
                    gr.HTML("<p>What is left empty is read as in the training data.</p>")
                    keys = [gr.Textbox(label=label, max_length=200) for label in _KEYS.values()]
                    controls = gr.Checkbox(label="every cell is a control")
                    missing = gr.Checkbox(label="read genes that the file lacks as not expressed")
                    scale = gr.Checkbox(label="convert log1p values of another scale")
                about_cells = gr.HTML(elem_classes="said", elem_id="cells")
                context = gr.Dropdown([], label="context", allow_custom_value=True, elem_id="context")
                first = gr.Dropdown(
                    [(printable(name), name) for name in known],
                    value=known[0] if known else None,
                    label="perturbation",
                    allow_custom_value=True,
                    elem_id="perturbation",
                )
                second = gr.Dropdown(
                    [("none", ""), *((printable(name), name) for name in known)],
                    value="",
                    label="and a second one, together with it",
                    allow_custom_value=True,
                    visible=processor.combination_separator is not None,
                    elem_id="second",
                )
                doses = doses_of(trained, known[0]) if known else []
                dose = gr.Dropdown(
                    doses,
                    value=doses[-1] if doses else None,
                    label="dose",
                    allow_custom_value=True,
                    visible=processor.dose_key is not None,
                    elem_id="dose",
                )
                number = gr.Slider(10, MOST_CELLS, value=500, step=10, label="control cells, at most")
                ask = gr.Button("Predict", variant="primary", elem_id="ask")
            with gr.Column(scale=2, min_width=320):
                said = gr.HTML("<p>Choose control cells and a perturbation.</p>", elem_classes="said", elem_id="said")
                with gr.Column(visible=False, elem_id="answer") as shown:
                    download = gr.DownloadButton("Download the predicted cells (.h5ad)", elem_id="download")
                    bars = gr.Plot(label="change", show_label=False, elem_id="bars")
                    how_placed = gr.Radio([PCA, UMAP], value=PCA, label="cells in two dimensions, by")
                    places = gr.Plot(label="cells", show_label=False, elem_id="places")
                    no_places = gr.HTML()
                    table = gr.Dataframe(
                        label=f"the {_ROWS} genes that change most", interactive=False, elem_id="genes", max_height=400
                    )
        with gr.Accordion("What the model learned from, what was held out, and how good it is", open=False):
            gr.HTML(model_html(trained), elem_classes="said", elem_id="model")

        reading = [*keys, controls, missing, scale]

        def path_of(choice: str, uploaded: str | None) -> str | Path | None:
            return cells if cells is not None and choice != OWN else uploaded

        def reading_of(choice: str, values: tuple) -> Reading:
            # The cells of the app are read as they are.
            return Reading() if choice != OWN else Reading(dict(zip(_KEYS, values)), *values[len(_KEYS) :])

        def look(choice: str, uploaded: str | None, *values):
            path = path_of(choice, uploaded)
            mine = {"upload": gr.update(visible=choice == OWN), "how": gr.update(visible=choice == OWN)}
            if path is None:
                return *mine.values(), "", gr.update(choices=[], value=None)
            try:
                found = look_at(trained, path, reading_of(choice, values))
            except ERRORS as error:
                return *mine.values(), error_html(error), gr.update(choices=[], value=None)
            names = list(found.controls) if found.names_context else list(processor.vocabulary.contexts)
            chosen = names[0] if found.names_context else None
            choices = [(printable(name), name) for name in names]
            return *mine.values(), found_html(found), gr.update(choices=choices, value=chosen)

        def predict(old, choice, uploaded, asked, other, at, where, at_most, placed, *values):
            forget(old)
            path = path_of(choice, uploaded)
            own_folder = Path(mkdtemp(dir=folder))
            try:
                if path is None:
                    raise ValueError("no control cells are chosen; upload an .h5ad")
                question = Question(
                    path,
                    asked or "",
                    where or "",
                    other or "",
                    _dose(at) if processor.dose_key is not None else None,
                    int(at_most),
                    reading_of(choice, values),
                )
                found = answer(trained, question, own_folder)
                drawn = change_picture(found)
                placed_cells = place(found, placed)
            except ERRORS as error:
                forget(own_folder)
                hidden = gr.update(visible=False)
                return None, error_html(error), hidden, None, None, "", None, None
            except BaseException:
                forget(own_folder)
                raise
            rows = found.changes.head(_ROWS).assign(
                gene=[printable(gene) for gene in found.changes["gene"].head(_ROWS)]
            )
            rows = rows.round(4).rename(columns=lambda name: name.replace("_", " "))
            visible = gr.update(visible=True)
            return found, answer_html(trained, found), visible, drawn, *placed_cells, rows, str(found.file)

        def place(found: Answer | None, placed: str):
            if found is None:
                return None, ""
            where = cell_places(found, umap=placed == UMAP)
            if where is None:
                return None, "<p>Too few cells for a picture of them.</p>"
            return place_picture(where, placed == UMAP), ""

        looked: dict[str, Any] = {
            "fn": look,
            "inputs": [source, upload, *reading],
            "outputs": [upload, how, about_cells, context],
            "api_visibility": "private",
        }
        for event in (blocks.load, source.change, upload.change, *_changes(reading)):
            event(**looked)
        if processor.dose_key is not None:
            first.change(
                lambda name: gr.update(choices=doses_of(trained, name or "")), first, dose, api_visibility="private"
            )
        ask.click(
            predict,
            [kept, source, upload, first, second, dose, context, number, how_placed, *reading],
            [kept, said, shown, bars, places, no_places, table, download],
            **_ONE_BY_ONE,
        )
        how_placed.change(place, [kept, how_placed], [places, no_places], **_ONE_BY_ONE)
    blocks.queue(max_size=32)
    return blocks


@contextmanager
def without_downloads() -> Iterator[None]:
    """
    In this block gradio fetches nothing from other servers. Otherwise a request could name an address in place of a file, and
    what lies there would be fetched whole, whatever its size.
    """

    async def refuse(*args, **kwargs):
        raise gr.Error("this page fetches no addresses; upload the file")

    with (
        mock.patch.object(processing_utils, "async_ssrf_protected_download", refuse),
        mock.patch.object(processing_utils, "ssrf_protected_download", refuse),
    ):
        yield


def forget(old: Answer | Path | None):
    """Remove the files of an answer, which nobody needs any more."""
    if old is not None:
        shutil.rmtree(old if isinstance(old, Path) else old.file.parent, ignore_errors=True)


def _changes(components: list) -> list[Callable]:
    """The events after which a file is read anew; of a text, when it has been written."""
    return [one.blur if isinstance(one, gr.Textbox) else one.change for one in components]


def _dose(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"dose: expected a number above 0, found {text!r}") from error


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
