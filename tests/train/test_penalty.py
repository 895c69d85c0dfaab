"""EWC's gradient and its running sum on numbers worked out by hand."""

from pathlib import Path

import pytest
import torch

from mera_ds.checkpoint import write_product
from mera_ds.errors import DataError
from mera_ds.train import penalty
from mera_ds.train.penalty import accumulate, add_penalty_gradient, kept_as, load_importance


def held(dtype: str = "fp32") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    master = torch.tensor([1.0, 2.0, -1.0, 0.5], requires_grad=True)
    master.grad = torch.tensor([0.1, 0.2, 0.3, 0.4])
    values = {
        penalty.IMPORTANCE: torch.tensor([4.0, 0.5, 2.0, 0.0]),
        penalty.ANCHOR: torch.tensor([0.5, 2.0, 1.0, 9.0]),
    }
    kept = kept_as(dtype)
    return master, {key: value.to(kept[key]) for key, value in values.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("chunk", [1, 3, 1 << 24])
def test_gradient_by_hand(dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 + 3·4·(1 − 0.5) = 6.1, 0.2 + 3·0.5·0 = 0.2, 0.3 + 3·2·(−2) = −11.7, 0.4 + 0."""
    monkeypatch.setattr(penalty, "CHUNK", chunk)
    master, state = held(dtype)
    add_penalty_gradient(master, state, strength=3.0)
    assert master.grad is not None
    torch.testing.assert_close(master.grad, torch.tensor([6.1, 0.2, -11.7, 0.4]))
    assert master.tolist() == [1.0, 2.0, -1.0, 0.5]


def test_it_is_the_derivative_of_the_penalty() -> None:
    master, state = held()
    value = master.detach().clone().requires_grad_()
    importance, anchor = state[penalty.IMPORTANCE], state[penalty.ANCHOR]
    (3.0 / 2 * (importance * (value - anchor).square()).sum()).backward()
    before = master.grad.clone() if master.grad is not None else torch.zeros(4)
    add_penalty_gradient(master, state, strength=3.0)
    torch.testing.assert_close(master.grad, before + value.grad)


def test_bytes_per_parameter() -> None:
    """335.5 M parameters: 2.68 GB in fp32, 1.34 GB in half precision (paper, Table 3: 1.30 GB)."""
    sizes = {
        dtype: sum(torch.empty(0, dtype=kept).element_size() for kept in kept_as(dtype).values())
        for dtype in ("fp32", "fp16", "bf16")
    }
    assert sizes == {"fp32": 8, "fp16": 4, "bf16": 4}
    assert sizes["fp16"] * 335_544_320 / 1e9 == pytest.approx(38.73 - 37.43, rel=0.04)


def test_importances_add_up() -> None:
    """1·2 + 3 = 5; with decay ½: 1 + 3 = 4."""
    old, new = {"a": torch.tensor([2.0])}, {"a": torch.tensor([3.0])}
    assert accumulate(old, new, 1.0)["a"].item() == 5.0
    assert accumulate(old, new, 0.5)["a"].item() == 4.0


def test_importances_are_stored_and_read(tmp_path: Path) -> None:
    facts = {"key": "k", "step": "s", "base_sha256": "b", "previous": None}
    values = {"layer.lora_A": torch.rand(2, 3)}
    write_product(tmp_path / "fisher", importance=values, **facts)
    assert torch.equal(load_importance(tmp_path / "fisher")["layer.lora_A"], values["layer.lora_A"])
    write_product(tmp_path / "model", connectors={"image": values}, **facts)
    with pytest.raises(DataError, match=r"model holds no importances"):
        load_importance(tmp_path / "model")
