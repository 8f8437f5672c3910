"""Claims about the rendered results: every number of README, docs/results and model_cards comes from a result file."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from eval import report
from eval.pages import RESULTS, nl_rx
from llm_jepa import UserError


def test_readme_and_pages_are_rendered_from_the_result_files():
    assert report.main(["--check"]) == 0


def test_a_page_without_its_markers_is_refused():
    begin = report.BEGIN.format("vl")
    assert report.with_blocks(f"a\n{begin}\nold\n{report.END}\nb", {"vl": "new"}, "vl.md") == (
        f"a\n{begin}\nnew\n{report.END}\nb"
    )
    for text in ("none", f"{begin} without an end", f"{begin}{report.END}{begin}{report.END}"):
        with pytest.raises(UserError, match="vl.md must hold"):
            report.with_blocks(text, {"vl": "new"}, "vl.md")


def test_every_page_has_a_line_in_the_index():
    index = (report.PAGES / "README.md").read_text()
    for page in report.PAGES.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_report_means_and_spreads(tmp_path):
    """Two seeds with 10 % and 30 %: mean 20.0, sample standard deviation sqrt(200) = 14.1."""
    for seed, share in ((0, 0.1), (1, 0.3)):
        figures = {"exact": share, "startswith": 0.5, "stop_rate": 1.0}
        space = {"recall_at_1": 0.5, "raw_cosine_mismatched": 0.1, "effective_rank_predicted": 9.0}
        result = {
            "metrics": {"original": figures, "paraphrase": figures},
            "items": 10,
            "dropped_as_known_from_train": 2,
            "model": {"validation": space, "train_tokens": 100, "run": {"seed": seed}},
            "environment": {"commit": "abcdef123", "torch": "1", "transformers": "2", "trl": "3"},
        }
        (tmp_path / f"completion-sft-seed{seed}.json").write_text(json.dumps(result))
    text = nl_rx.table(nl_rx.load(tmp_path))
    assert "| completion | plain SFT | 20.0 ± 14.1 | 50.0 ± 0.0 |" in text
    assert statistics.stdev([10, 30]) == pytest.approx(14.142, abs=1e-3)
    assert "seeds 0, 1 on 10 test lines (2 of 12" in text and "abcdef1" in text


def test_a_card_that_is_stale_or_missing_is_found_and_rendered(tmp_path, monkeypatch, capsys):
    # Copies, so that the real files are not written to.
    monkeypatch.setattr(report, "README", Path(shutil.copy(report.README, tmp_path)))
    monkeypatch.setattr(report, "PAGES", Path(shutil.copytree(report.PAGES, tmp_path / "pages")))
    monkeypatch.setattr(report, "CARDS", tmp_path / "cards")
    monkeypatch.setattr(report, "CHECKPOINTS", Path(shutil.copytree(report.CHECKPOINTS, tmp_path / "checkpoints")))
    assert report.main(["--check"]) == 1 and not (tmp_path / "cards").exists()
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    path = tmp_path / "cards" / "tiny-llama-nl-rx-info-nce.md"
    exact = [run["metrics"]["original"]["exact"] for run in nl_rx.load()["completion", "info_nce"]]
    found = ModelCard.load(path).data.eval_results
    assert found[0].metric_value == pytest.approx(statistics.mean(exact), abs=1e-4)
    path.write_text(path.read_text().replace(f"{100 * statistics.mean(exact):.1f} ±", "99.9 ±"))
    assert "99.9 ±" in path.read_text()
    capsys.readouterr()
    assert report.main(["--check"]) == 1 and path.name in capsys.readouterr().err


def test_committed_results_are_complete_and_name_no_machine():
    """Every arm has the same seeds; every file was made from a clean commit."""
    runs = nl_rx.load()
    assert set(runs) == {(protocol, arm) for protocol in nl_rx.PROTOCOLS for arm in nl_rx.ARMS}
    seeds = {key: [result["model"]["run"]["seed"] for result in results] for key, results in runs.items()}
    assert all(value == [0, 1, 2] for value in seeds.values()), seeds
    for results in runs.values():
        for result in results:
            assert result["items"] == 1771
    files = list(RESULTS.rglob("*.json"))
    assert len(files) > 150
    for path in files:
        text = path.read_text()
        assert not re.search(r'"uncommitted_changes": (?!false)', text), path
        assert not any(word in text for word in ("/home/", "/tmp/", "/root/", "/work/")), path
