"""What the pages of ``bptt-jax diagnose --html`` and ``bptt-jax atlas`` show."""

from collections.abc import Mapping, Sequence
from typing import Any

from bptt_jax.analysis.flow_results import GradientFlow
from bptt_jax.cli.atlas import AtlasPart
from bptt_jax.cli.report import noise_in_words
from bptt_jax.pages.document import document, drawing
from bptt_jax.pages.report import report_page
from bptt_jax.results import counted


def flow_page(
    title: str,
    record: Mapping[str, Any],
    flows: Mapping[str, GradientFlow],
    gated: Mapping[str, bool | None],
) -> str:
    """An HTML document; the same arguments give the same text.

    Args:
      title: what was measured.
      record: of `bptt_jax.cli.diagnose.record`.
      flows: by name.
      gated: which have gates.
    """
    computed = {**record["versions"], "device": record["device"]}
    tables = {"Of the command, as in flow.json": _options(record), "Computed with": computed}
    if record["noise"]:
        tables = {"Noise, at the batch size of the run": noise_in_words(record["noise"]), **tables}
    return report_page(flows, title, tables=tables, gated=gated)


def atlas_page(
    title: str,
    parts: Sequence[AtlasPart],
    settings: Mapping[str, Any],
    computed: Mapping[str, str],
    meanings: Mapping[str, str],
    failed: Mapping[str, str],
) -> str:
    """An HTML document of the atlas; the same arguments give the same text.

    Args:
      title: what was measured.
      parts: in their order.
      settings: of the command.
      computed: with what.
      meanings: of the numbers.
      failed: why a cell is missing.
    """
    shown = {name: "none" if value is None else str(value) for name, value in settings.items()}
    tables = {"Of the command, as in atlas.json": shown, "Computed with": computed}
    drawn = [
        {
            "heading": part.heading,
            "columns": part.columns,
            "rows": part.rows,
            "drawing": drawing(
                part.figure, f"map-{i}", f"{part.heading}: map of {counted(len(part.rows), 'cell')}"
            ),
        }
        for i, part in enumerate(parts)
    ]
    return document(
        "atlas.html",
        "Atlas of cells",
        title,
        tables=tables | ({"Not measured": failed} if failed else {}),
        meanings=meanings,
        parts=drawn,
    )


def _options(record: Mapping[str, Any]) -> dict[str, str]:
    def shown(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(shown, value)) or "none"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "not given" if value is None else str(value)

    options = {name: shown(value) for name, value in record["settings"].items()}
    if record["vocabulary"] is not None:
        options["characters of the text"] = f"{len(record['vocabulary'])} different ones"
    return options
