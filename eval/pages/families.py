"""README.md's table of the families: one command and one measured result each."""

from __future__ import annotations

from ..figures.tables import mean_spread
from . import nl_rx, render, vl


def families_table() -> str:
    runs = nl_rx.load()
    sft, info_nce = runs["completion", "sft"], runs["completion", "info_nce"]
    scratch = vl.shapestream_runs()["scratch"]
    return render(
        "families",
        seeds=len(info_nce),
        recall=mean_spread([nl_rx.space(result, "recall_at_1") for result in info_nce], ".2f"),
        sft_recall=mean_spread([nl_rx.space(result, "recall_at_1") for result in sft], ".2f"),
        exact=mean_spread([nl_rx.percent(result, "original", "exact") for result in info_nce]),
        sft_exact=mean_spread([nl_rx.percent(result, "original", "exact") for result in sft]),
        vl_seeds=len(scratch),
        kinds=mean_spread([result["test"]["kind_accuracy"] for result in scratch], ".3f"),
    )
