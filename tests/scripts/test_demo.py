"""The demo on small pictures: its pieces, its tables and the picture it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from normgraph.scripts import demo, demo_pictures

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sequence[demo.Result]]:
    """The demo on two pictures of 12 x 17: the first two operators, so that both are seen."""
    out = tmp_path_factory.mktemp("demo")
    pictures = demo_pictures.photographs()[:, :, ::37, ::39]
    return out, demo.run(pictures, out, operators=("instance_norm", "rms_norm"), rounds=1)


def test_everything_verifies_and_is_timed(
    finished: tuple[Path, Sequence[demo.Result]],
) -> None:
    out, results = finished
    assert [result.job.spec.op for result in results] == ["instance_norm", "rms_norm"]
    for result in results:
        assert result.random.ok, result.random.to_text()
        assert result.photographs.ok, result.photographs.to_text()
        assert result.loss > 0.0
    text = demo.report(results, out)
    assert "PASSED instance_norm" in text
    assert "FAILED" not in text
    for row in ("dgamma", "inv_std", "backward_from_output"):
        assert row in text


def test_instance_norm_makes_one_picture_of_all_exposures(
    finished: tuple[Path, Sequence[demo.Result]],
) -> None:
    y = finished[1][0].y.reshape(2, len(demo_pictures.EXPOSURES), 3, 12, 17)
    # eps = 1e-5 beside a variance that the underexposed one has 0.09 of.
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), atol=0.02)
    assert np.ptp(y) > 0.5


def test_the_picture_is_written(finished: tuple[Path, Sequence[demo.Result]]) -> None:
    with Image.open(finished[0] / "instance_norm.png") as picture:
        assert picture.width > 4 * 17
        assert picture.height > 4 * 12
        assert len(set(np.asarray(picture).reshape(-1, 3).sum(axis=1).tolist())) > 100


def test_the_photographs_are_real_and_credited() -> None:
    pictures = demo_pictures.photographs()
    assert pictures.shape == (2, 3, 427, 640)
    assert pictures.dtype == np.float32
    assert 0.0 <= pictures.min() < 0.1 < 0.9 < pictures.max() <= 1.0
    assert "CC BY 2.0" in demo_pictures.CREDIT
    batch = demo_pictures.exposures(pictures)
    assert batch.shape == (8, 3, 427, 640)
    np.testing.assert_array_equal(batch[0], pictures[0])
    np.testing.assert_allclose(batch[5], 0.3 * pictures[1], rtol=1e-6)


def test_every_operator_is_in_the_demo() -> None:
    operators = [job.spec.op for job in demo.jobs(640)]
    assert operators[:2] == ["instance_norm", "batch_norm"]
    assert set(operators[2:]) == {"group_norm", "layer_norm", "rms_norm"}
