"""The method on one page trains as train.py does, bit for bit."""

import one_page
import torch

import data
import train


def test_two_rounds_end_at_the_weights_of_train_py(monkeypatch, tmp_path):
    small = data.draw_patterns(300, 50)
    monkeypatch.setattr(data, "draw_patterns", lambda: small)
    monkeypatch.setattr(one_page, "draw_patterns", lambda: small)
    for name, value in {"WIDTH": 4, "ROUNDS": 2, "EPOCHS": 1, "BATCH": 16}.items():
        monkeypatch.setattr(one_page, name, value)
    state = one_page.main().state_dict()

    flags = "--dataset patterns --device cpu --width 4 --clients 3 --alpha 1 --rounds 2"
    flags += f" --local-epochs 1 --batch-size 16 --lr 0.05 --out {tmp_path}/run"
    train.main(flags.split())
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state.keys() == checkpoint["model"].keys()
    for name, value in checkpoint["model"].items():
        assert torch.equal(state[name], value), name
