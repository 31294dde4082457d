"""What the page says, as HTML in which names from data are text and nothing else."""

from jinja2 import Environment, StrictUndefined

from pertstate.app.answers import Answer, how_sure
from pertstate.app.cells import CellsFound
from pertstate.base.input_errors import line_of
from pertstate.base.messages import counted
from pertstate.base.printable import printable
from pertstate.base.public import public, public_text
from pertstate.evaluation.record_text import entries_of, in_short
from pertstate.hub.trained import TrainedModel


_TEMPLATES = {
    "error": '<p class="problem" role="alert">{{ line }}</p>',
    "found": "<p>{{ cells }}, control cells of {{ contexts }}.{% if note %} {{ note }}.{% endif %}</p>",
    "answer": "<p><strong>{{ perturbation }}</strong> in <strong>{{ context }}</strong>: {{ cells }} predicted, each from one real "
    "control cell.</p><ul>{% for sentence in sentences %}<li>{{ sentence }}</li>{% endfor %}</ul>"
    "<p>The intervals say how much a change depends on the cells that were drawn, and nothing of how right the model is.</p>",
    "model": """
{%- macro listed(entries) -%}
<dl>
{% for entry in entries %}
<dt>{{ entry.name | shown }}</dt>
<dd>
{% if entry.entries is not none %}{{ listed(entry.entries) }}
{% elif entry["items"] is not none %}
<ul>{% for item in entry["items"][:20] %}<li>{{ item | shown }}</li>{% else %}<li>none</li>{% endfor %}</ul>
{% if entry["items"] | length > 20 %}<p>and {{ entry["items"] | length - 20 }} more</p>{% endif %}
{% else %}{{ entry.text | shown }}{% endif %}
</dd>
{% endfor %}
</dl>
{%- endmacro -%}
<p>{{ about }}</p>
{% if verdict %}<p>Its run scored what it held out. {{ verdict }}.</p>
{% else %}<p>How good it is was not measured: no scores lie beside the checkpoint.</p>{% endif %}
{% if entries %}{{ listed(entries) }}
{% else %}<p>What it was trained on is not recorded.</p>{% endif %}
""",
}
_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["shown"] = printable


def _render(name: str, **values) -> str:
    return _ENVIRONMENT.from_string(_TEMPLATES[name]).render(
        {key: printable(value) if isinstance(value, str) else value for key, value in values.items()}
    )


def error_html(error: BaseException) -> str:
    """An error of input: its one line, in which paths of this machine are cut to their last parts."""
    return _render("error", line=public_text(line_of(error)))


def found_html(found: CellsFound) -> str:
    """What a file of cells holds."""
    contexts = [f"{name} ({count:,})" for name, count in list(found.controls.items())[:10]]
    more = len(found.controls) - len(contexts)
    named = ", ".join(contexts) + (f" and {counted(more, 'more context')}" if more else "")
    named = named if found.names_context else f"no named context ({sum(found.controls.values()):,}): write its name"
    return _render("found", cells=counted(found.cells, "cell"), contexts=named, note=found.note)


def answer_html(trained: TrainedModel, found: Answer) -> str:
    """What was predicted, and how sure that is."""
    sentences = [printable(said) for said in how_sure(trained, found)]
    return _render(
        "answer",
        perturbation=found.perturbation,
        context=found.context,
        cells=counted(found.cells, "cell"),
        sentences=sentences,
    )


def model_html(trained: TrainedModel) -> str:
    """What the model is, how good it is, what it was trained on and what was held out."""
    config = trained.model.config
    genes = len(trained.processor.vocabulary.genes)
    about = f"{public(trained.name)}: {config.model_type}, {trained.model.num_parameters():,} parameters, " + (
        f"{genes:,} genes" if genes else f"{config.output_dim:,} dimensions of an embedding"
    )
    entries = [] if trained.record is None else entries_of(public(in_short(trained.record.to_dict())))
    verdict = "" if trained.scores is None else trained.scores.verdict.rstrip(".")
    return _render("model", about=about, verdict=verdict, entries=entries)
