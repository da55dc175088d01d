"""PyTorch files: what is imported computes what PyTorch computes; everything else is refused by name."""

from __future__ import annotations

import json
import string
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.detection import read_foreign
from service.importing.vocabulary import fit, tokens_of_option
from tests.harness.foreign_models import CHARSET, DIM, UNITS, imported_log_probs

IDS = np.random.default_rng(1).integers(0, len(CHARSET), 40)
V = len(CHARSET)


class Net(nn.Module):
    """A character model as people write it."""

    def __init__(self, num_layers: int = 1, dim: int = DIM, *, bias: bool = True, tied: bool = False, vocab: int = V):
        super().__init__()
        torch.manual_seed(num_layers)
        self.lookup = nn.Embedding(vocab, dim)
        self.recur = nn.GRU(dim, UNITS, num_layers, dropout=0.1 if num_layers > 1 else 0.0)
        self.drop = nn.Dropout(0.5)
        self.to_chars = nn.Linear(UNITS, vocab, bias=bias)
        if tied:
            self.to_chars.weight = self.lookup.weight
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0, 0.6)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.recur(self.lookup(ids))[0]
        return torch.log_softmax(self.to_chars(self.drop(states)), -1)


class OneHot(nn.Module):
    """A model that reads one-hot vectors, with cells instead of layers."""

    def __init__(self, units: int = UNITS) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.cell = nn.GRUCell(V, units)
        self.fc = nn.Linear(units, V)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, out = torch.zeros(self.cell.hidden_size), []
        for vector in torch.eye(V)[ids]:
            hidden = self.cell(vector, hidden)
            out.append(torch.log_softmax(self.fc(hidden), -1))
        return torch.stack(out)


def same(path: Path, net: nn.Module, charset: str | None = CHARSET, order: tuple[str, ...] = ()) -> None:
    net.eval()
    with torch.no_grad():
        expected = net(torch.from_numpy(IDS)).numpy()
    np.testing.assert_allclose(imported_log_probs(path, charset, order)(IDS), expected, atol=3e-6)


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("dim", [DIM, UNITS])
def test_torch__every_kind_of_file_gives_what_torch_computes(tmp_path: Path, num_layers: int, dim: int) -> None:
    net = Net(num_layers, dim)
    state = net.state_dict()
    same(saved(tmp_path / "a.pt", state), net)
    same(saved(tmp_path / "b.pt", net), net)
    same(saved(tmp_path / "c.pt", state, _use_new_zipfile_serialization=False), net)
    same(saved(tmp_path / "d.pt", net, _use_new_zipfile_serialization=False), net)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.from_numpy(IDS)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "model_state": net.state_dict(),
        "loss": np.float64(1),
    }
    same(saved(tmp_path / "e.pt", checkpoint), net)
    prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in net.state_dict().items()}
    same(saved(tmp_path / "f.pt", prefixed), net)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, tmp_path / "g.safetensors")
    same(tmp_path / "g.safetensors", net)


@pytest.mark.parametrize("bias", [True, False])
def test_torch__tied_embeddings(tmp_path: Path, bias: bool) -> None:
    net = Net(dim=UNITS, tied=True, bias=bias)
    same(saved(tmp_path / "a.pt", net.state_dict()), net)
    same(saved(tmp_path / "b.pt", net), net)
    state = net.state_dict()
    del state["to_chars.weight"]  # as safetensors stores shared tensors: once
    save_file(state, tmp_path / "c.safetensors")
    same(tmp_path / "c.safetensors", net)


def test_torch__output_without_bias_is_told_from_an_embedding_of_the_same_shape(tmp_path: Path) -> None:
    net = Net(dim=UNITS, bias=False)
    same(saved(tmp_path / "module.pt", net), net)  # by its class
    renamed = {name.replace("lookup", "emb").replace("to_chars", "fc"): one for name, one in net.state_dict().items()}
    same(saved(tmp_path / "names.pt", renamed), net)
    unclear = {name.replace("lookup", "a").replace("to_chars", "b"): one for name, one in net.state_dict().items()}
    with pytest.raises(UnsupportedModel, match="which of a and b is the embedding"):
        read_foreign(saved(tmp_path / "unclear.pt", unclear))


@pytest.mark.parametrize("units", [2, UNITS])
def test_torch__one_hot_inputs_and_cells(tmp_path: Path, units: int) -> None:
    net = OneHot(units)
    same(saved(tmp_path / "a.pt", net.state_dict()), net)
    same(saved(tmp_path / "b.pt", net), net)


def test_torch__several_gru_modules_compute_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    net = Net(2, UNITS)
    state = net.state_dict()
    split = {
        name.replace("recur", f"rnn{name[-1]}").replace("_l1", "_l0") if name.startswith("recur") else name: tensor
        for name, tensor in reversed(state.items())
    }
    same(saved(tmp_path / "a.pt", split), net)
    named = {name.replace("rnn0", "first").replace("rnn1", "last"): tensor for name, tensor in split.items()}
    same(saved(tmp_path / "b.pt", named), net, order=("first", "last"))
    with pytest.raises(UnsupportedModel, match="--layers-from"):
        read_foreign(tmp_path / "b.pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_torch__other_precisions_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    net = Net()
    state = {name: tensor.to(dtype) for name, tensor in net.state_dict().items()}
    net.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    same(saved(tmp_path / "a.pt", state), net)
    save_file(state, tmp_path / "b.safetensors")
    same(tmp_path / "b.safetensors", net)


def test_torch__transposed_and_sliced_tensors_are_read_by_their_strides(tmp_path: Path) -> None:
    net = Net()
    state = net.state_dict()
    state["lookup.weight"] = state["lookup.weight"].T.contiguous().T
    state["to_chars.weight"] = torch.cat([torch.ones(2, UNITS), state["to_chars.weight"]])[2:]
    same(saved(tmp_path / "a.pt", state), net)


VOCABULARIES: dict[str, Any] = {
    "chars": CHARSET,
    "vocab": list(CHARSET),
    "char2idx": {char: index for index, char in enumerate(CHARSET)},
    "idx2char": dict(enumerate(CHARSET)),
    "tuple_of_chars": tuple(CHARSET),
}


@pytest.mark.parametrize("key", VOCABULARIES)
def test_torch__vocabulary_is_taken_from_the_checkpoint(tmp_path: Path, key: str) -> None:
    net = Net()
    other = {"args": {"names": ["x", "y"]}, "letters_seen": 7, "numbers": list(range(V))}
    same(saved(tmp_path / "a.pt", {"net": net.state_dict(), **other, key: VOCABULARIES[key]}), net, None)


def test_torch__vocabulary_of_a_module_and_rows_that_are_no_character(tmp_path: Path) -> None:
    net = Net(vocab=V + 2)
    net.stoi = {"<pad>": 0, "<unk>": V + 1} | {char: index + 1 for index, char in enumerate(CHARSET)}  # type: ignore[assignment]
    net.eval()
    with torch.no_grad():
        expected = net(torch.from_numpy(IDS + 1)).numpy()[:, 1:-1]
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    found = imported_log_probs(saved(tmp_path / "a.pt", net))(IDS)
    np.testing.assert_allclose(found, expected, atol=3e-6)


def test_torch__without_a_vocabulary_nothing_is_guessed(tmp_path: Path) -> None:
    model, _ = read_foreign(saved(tmp_path / "a.pt", Net(vocab=len(string.printable)).state_dict()))
    assert model.tokens is None


def module(**children: nn.Module) -> nn.Module:
    net = Net()
    for name, child in children.items():
        setattr(net, name, child)
    return net


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.attn = nn.MultiheadAttention(UNITS, 2)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "lstm": (module(recur=nn.LSTM(DIM, UNITS)), "LSTM"),
    "rnn": (module(recur=nn.RNN(DIM, UNITS)), "a plain RNN|of the kind RNN"),
    "bidirectional": (module(recur=nn.GRU(DIM, UNITS, bidirectional=True)), "bidirectional=False"),
    "norm": (module(norm=nn.LayerNorm(UNITS)), "normalisation|LayerNorm"),
    "hidden_layer": (module(middle=nn.Linear(UNITS, UNITS)), "2 linear layers"),
    "attention": (Attended(), "attention|MultiheadAttention"),
    "conv": (module(conv=nn.Conv1d(2, 2, 2)), "convolution|Conv1d"),
    "relu": (module(act=nn.ReLU()), "ReLU"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_torch__another_function_is_refused_by_name(tmp_path: Path, name: str) -> None:
    net, message = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=message):
        read_foreign(saved(tmp_path / "module.pt", net))
    if name != "relu":  # which has no weights
        with pytest.raises(UnsupportedModel, match=message):
            read_foreign(saved(tmp_path / "state.pt", net.state_dict()))


def test_torch__learnt_initial_state_is_refused(tmp_path: Path) -> None:
    net = Net()
    net.h0 = nn.Parameter(torch.zeros(1, 1, UNITS))
    with pytest.raises(UnsupportedModel, match="an initial state that was learnt"):
        read_foreign(saved(tmp_path / "a.pt", net.state_dict()))


def test_torch__two_models_in_a_file_are_told_apart_by_name(tmp_path: Path) -> None:
    one, other = Net(1), Net(2)
    path = saved(tmp_path / "a.pt", {"best": one.state_dict(), "last": other.state_dict()})
    with pytest.raises(UnsupportedModel, match=r"2 models \(best, last\)"):
        read_foreign(path)
    same(path, other, order=("last",))


def test_torch__scripts_and_other_pickles_are_refused(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": [1, 2]}))
    with pytest.raises(InvalidModelFile, match=r"torch\.save has not written"):
        read_foreign(tmp_path / "a.pkl")
    with pytest.raises(InvalidModelFile, match="no tensors"):
        read_foreign(saved(tmp_path / "b.pt", OrderedDict(a=1)))
    with pytest.raises(UnsupportedModel, match="no recurrent layer"):
        read_foreign(saved(tmp_path / "c.pt", nn.Linear(2, 2).state_dict()))


def test_torch__checkpoint_with_a_whole_optimizer(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.from_numpy(IDS)).sum().backward()
    optimizer.step()
    same(saved(tmp_path / "a.pt", {"model": net, "optimizer": optimizer}), net)


def test_torch__module_in_data_parallel(tmp_path: Path) -> None:
    net = Net()
    same(saved(tmp_path / "a.pt", nn.DataParallel(net)), net)


def test_torch__embedding_that_limits_the_norm_of_its_rows_is_refused(tmp_path: Path) -> None:
    net = Net()
    net.lookup.max_norm = 0.1
    with pytest.raises(UnsupportedModel, match=r"lookup has max_norm=0\.1"):
        read_foreign(saved(tmp_path / "a.pt", net))


@pytest.mark.parametrize("kind", ["char2idx", "idx2char"])
def test_vocabulary__rows_after_the_numbered_characters_are_left_out(tmp_path: Path, kind: str) -> None:
    net = Net(vocab=V + 1)
    net.eval()
    numbered: dict[Any, Any] = {char: index for index, char in enumerate(CHARSET)}
    if kind == "idx2char":
        numbered = {index: char for char, index in numbered.items()}
    with torch.no_grad():
        expected = net(torch.from_numpy(IDS)).numpy()[:, :V]
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    path = saved(tmp_path / "a.pt", {"model": net.state_dict(), kind: numbered})
    np.testing.assert_allclose(imported_log_probs(path)(IDS), expected, atol=3e-6)


def test_vocabulary__numbers_in_a_charset_file_are_those_of_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "chars.json"
    file.write_text(json.dumps({char: index for index, char in enumerate(CHARSET)}))
    tokens, _ = fit(tokens_of_option(str(file), V + 2), V + 2, "x")
    assert tokens == (*CHARSET, None, None)


def test_vocabulary__array_of_characters(tmp_path: Path) -> None:
    net = Net()
    path = saved(tmp_path / "a.pt", {"model": net.state_dict(), "idx2char": np.array(list(CHARSET))})
    same(path, net, None)
    same(saved(tmp_path / "b.pt", {"m": net.state_dict(), "chars": np.array(list(CHARSET), object)}), net, None)


def test_torch__weights_that_are_parts_of_one_array(tmp_path: Path) -> None:
    net = Net(2)
    state = net.state_dict()  # on CUDA, the weights of a GRU are
    flat = torch.cat([one.reshape(-1) for one in state.values()])
    parts = flat.split([one.numel() for one in state.values()])
    flattened = {name: part.view(one.shape) for (name, one), part in zip(state.items(), parts, strict=True)}
    same(saved(tmp_path / "a.pt", flattened), net)
    same(saved(tmp_path / "b.pt", flattened, _use_new_zipfile_serialization=False), net)


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


class Tempered(Net):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.__dict__.update(attributes)


def test_torch__modules_whose_program_would_have_to_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"the module half \(.*Halved\) has no weights"):
        read_foreign(saved(tmp_path / "a.pt", module(half=Halved())))
    for attributes in ({"temperature": 0.7}, {"residual": True}, {"logit_scale": 2}, {"use_skip": True}):
        with pytest.raises(UnsupportedModel, match=f"has {next(iter(attributes))}="):
            read_foreign(saved(tmp_path / "a.pt", Tempered(**attributes)))
    net = Tempered(temperature=1.0, residual=False, scale=1, template=3)
    same(saved(tmp_path / "b.pt", net), net)


@pytest.mark.parametrize("name", ["temperature", "scale"])
def test_torch__further_numbers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    for shape in ((), (1,)):
        for is_buffer in (True, False):
            net = Net()
            number = torch.full(shape, 0.7)
            net.register_buffer(name, number) if is_buffer else net.register_parameter(name, nn.Parameter(number))
            for kind, value in (("state", net.state_dict()), ("module", net)):
                with pytest.raises(UnsupportedModel, match=f"{name} is a layer of another kind"):
                    read_foreign(saved(tmp_path / f"{kind}.pt", value))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_torch__prefixes_of_wrappers_are_no_layers(tmp_path: Path, prefix: str) -> None:
    net = Net()
    state = {prefix + key: value for key, value in net.state_dict().items()}
    same(saved(tmp_path / "a.pt", state), net)
    same(
        saved(tmp_path / "b.ckpt", {"state_dict": state, "epoch": 1, "optimizer_states": [], "hyper_parameters": {}}),
        net,
    )
