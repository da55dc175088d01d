"""Damaged and hostile files: a clear error, nothing executed, and no more memory than three times the file.

`make test` tries a few hundred; IMPORT_FUZZ=2000 tries as many.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save as save_safetensors
from torch import nn

from service.errors import InvalidModelFile, OperatorError
from service.exporting.onnx_format import write_onnx
from service.importing.conversion import convert
from service.importing.detection import read_foreign
from service.importing.protobuf import field
from service.importing.vocabulary import fit
from service.model.gru import GRUCharModel
from tests.harness.foreign_models import (
    CHARSET,
    checkpointed,
    keras_config,
    keras_weights,
    sequential,
    subclassed,
    table_of,
    write_bundle,
    write_hdf5,
    write_keras,
    write_saved_model,
)
from tests.harness.models import random_tensors, tiny_config

NUM_FILES = int(os.environ.get("IMPORT_FUZZ", "300"))
SLACK_BYTES = 4 << 20  # of Python's own objects: a file may be a few bytes long

CONFIG = tiny_config(charset=CHARSET, num_layers=2)
V = len(CHARSET)


def try_import(path: Path) -> str:
    """Import a file up to its publication. Return the error, or nothing. Any other exception fails the test."""
    message = ""
    try:
        model, _ = read_foreign(path)
        convert(model, fit(model.tokens or tuple(CHARSET), model.vocab_size, "x")[0])
    except OperatorError as error:
        message = error.message
    assert "\n" not in message
    assert len(message) < 2000
    return message


def bounded(path: Path) -> str:
    """Import a file. Fails if it took more memory than three times the file."""
    size = (
        path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    )
    tracemalloc.start()
    try:
        error = try_import(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 3 * size + SLACK_BYTES, f"{peak:,} bytes for a file of {size:,}"
    return error


# Whole files of every kind, to be damaged


def torch_file(path: Path, **options: Any) -> Path:
    tensors = {name: torch.from_numpy(array) for name, array in random_tensors(CONFIG).items()}
    torch.save({"state_dict": tensors, "chars": CHARSET}, path, **options)
    return path


def module_file(path: Path) -> Path:
    torch.save(GRUCharModel(CONFIG), path)
    return path


def safetensors_file(path: Path) -> Path:
    path.write_bytes(save_safetensors(random_tensors(CONFIG), {"chars": CHARSET}))
    return path


def onnx_file(path: Path) -> Path:
    with path.open("wb") as file:
        write_onnx(file, CONFIG, random_tensors(CONFIG))
    return path


def bundle_file(path: Path) -> Path:
    prefix = write_bundle(path, checkpointed(keras_weights()))
    return prefix.with_name(prefix.name + ".index")


def graph_file(path: Path) -> Path:
    weights = keras_weights(vocab=len(CHARSET) + 1)
    return write_saved_model(path, weights, CHARSET, range(1, len(CHARSET) + 1)) / "saved_model.pb"


MAKERS: dict[str, Callable[[Path], Path]] = {
    "zip": torch_file,
    "legacy": lambda path: torch_file(path, _use_new_zipfile_serialization=False),
    "module": module_file,
    "safetensors": safetensors_file,
    "onnx": onnx_file,
    "index": bundle_file,
    "graph": graph_file,
    "hdf5": lambda path: write_hdf5(path, subclassed(keras_weights())),
    "keras": lambda path: write_keras(path, sequential(keras_weights()), keras_config()),
}
# HDF5 is read in a process of its own, which takes a while to start: fewer of these.
WEIGHTS = {"hdf5": 0.35, "keras": 0.15}


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return a file with a few changes."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        kind, place = chance.randrange(7), chance.randrange(max(1, len(out)))
        place = place if chance.random() < 0.5 else place % min(len(out) or 1, 512)  # headers are at the beginning
        length = chance.choice((1, 2, 4, 8, 64))
        if kind == 0:
            out[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            out[place : place + length] = chance.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * length
        elif kind == 2:
            del out[place:]
        elif kind == 3:
            del out[place : place + length]
        elif kind == 4:
            out[place:place] = chance.randbytes(length)
        elif kind == 5:
            other = chance.randrange(max(1, len(out)))
            out[place : place + length] = out[other : other + length]
        else:
            out[place : place + 8] = struct.pack("<Q", chance.choice((2**31, 2**40, 2**63, len(out) + 1)))
    return bytes(out)


@pytest.mark.parametrize("kind", MAKERS)
def test_import__damaged_files_give_an_error_and_take_bounded_memory(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "model")
    whole = path.read_bytes()
    target = path.parent if kind == "graph" else path
    assert bounded(target) == ""
    chance = random.Random(kind)
    errors = 0
    shares = {one: WEIGHTS.get(one, 1.0) for one in MAKERS}
    for _ in range(max(4, round(NUM_FILES * shares[kind] / sum(shares.values())))):
        path.write_bytes(damaged(whole, chance))
        errors += bounded(target) != ""
    assert errors > 0


# Pickles


class Call:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def zip_of(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", data)
        archive.writestr("model/version", "3")
    return file.getvalue()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle__nothing_is_called(tmp_path: Path, protocol: int, is_zip: bool) -> None:
    ran = tmp_path / "ran"
    calls = [
        Call(os.system, f"touch {ran}"),
        Call(eval, f"open({str(ran)!r}, 'w')"),
        Call(Path.touch, ran),
        Call(subprocess.Popen, ["touch", str(ran)]),
        Call(torch.load, str(ran)),
        Call(getattr, os, "system"),
        Call(np.save, str(ran), 1),
    ]
    for call in calls:
        try:
            data = pickle.dumps({"a": call}, protocol)
        except (pickle.PicklingError, TypeError):
            continue  # a protocol that can't name it
        if not is_zip and protocol < 2:
            continue  # such a file isn't one of PyTorch's
        (tmp_path / "m.pt").write_bytes(zip_of(data) if is_zip else data)
        assert "Nothing was executed" in bounded(tmp_path / "m.pt")
        assert not ran.exists()


PICKLES: dict[str, bytes] = {
    "names_only": b"\x80\x02cos\nsystem\n.",
    "memo": b"\x80\x02" + b"]r\xff\xff\xff\xff" * 1000 + b".",
    "objects": b"\x80\x02(" + b"}" * 4_000_000 + b"t.",
    "doubling": b"\x80\x02]" + b"q\x00h\x00h\x00\x86" * 100 + b".",
    "keys": b"\x80\x02)" + b"2\x86" * 200 + b"}(h\x00Nu.",
    "hash": b"\x80\x02N" + b"2\x86" * 200 + b"q\x00}h\x00Ns.",
    "length": b"\x80\x04\x8d" + struct.pack("<Q", 2**60),
    "integer": b"\x80\x02\x8b" + struct.pack("<I", 2**31) + b"1" * 100,
    "digits": b"\x80\x02I" + b"9" * 4000 + b"\n.",
    "nested": b"\x80\x02" + b"]" * 15_000 + b"a" * 14_999 + b".",
    "marks": b"\x80\x02" + b"(" * 15_000 + b"t" * 15_000 + b".",
    "extension": b"\x80\x02\x82\x01.",
    "buffer": b"\x80\x05\x97.",
    "stack": b"\x80\x02R.",
    "sets": b"\x80\x04(" + b"\x8f" * 1_000_000 + b"t.",
    "objects_of_classes": b"\x80\x02cx\ny\nq\x00(" + b"h\x00)\x81" * 1_000_000 + b"t.",
    "wide_text": b"\x80\x02X" + struct.pack("<I", 8_000_004) + "😀".encode() + b"a" * 8_000_000 + b".",
    "no_stop": b"\x80\x02N",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickle__bombs_are_refused(tmp_path: Path, name: str) -> None:
    for data in (PICKLES[name], zip_of(PICKLES[name])):
        (tmp_path / "m.pt").write_bytes(data)
        assert bounded(tmp_path / "m.pt")


def tensor_pickle(numel: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """A state dict with a GRU's recurrent weights of this shape, whose storage is declared with `numel` numbers."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(numel) + b"tQ"
    rest = number(offset) + numbers(shape) + numbers(strides) + b"\x89}tR"
    one = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest
    names = ("weight_hh_l0", "weight_ih_l0", "emb.weight")
    return b"\x80\x02}(" + b"".join(text(name) + one for name in names) + b"u."


@pytest.mark.parametrize(
    ("numel", "shape", "strides", "offset"),
    [
        (2**33, (2**20, 2**13), (2**13, 1), 0),
        (4, (300_000, 100_000), (0, 0), 0),
        (12, (6, 2), (2, 1), 2**39),
        (12, (6, 2), (2**30, 1), 0),
        (-1, (6, 2), (2, 1), 0),
        (12, (-6, -2), (2, 1), 0),
        (12, (0, 2), (2, 1), 0),
    ],
)
def test_torch__declared_sizes_are_compared_with_the_file(
    tmp_path: Path, numel: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", tensor_pickle(numel, shape, strides, offset))
        archive.writestr("m/data/0", b"\0" * 48)
    assert bounded(tmp_path / "m.pt")


# Archives


def test_archive__bombs_are_refused(tmp_path: Path) -> None:
    config = json.dumps(keras_config())
    for member, size in (("config.json", 100 << 20), ("model.weights.h5", 500 << 20)):
        with zipfile.ZipFile(tmp_path / "bomb.keras", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("config.json", "model.weights.h5"):
                if name == member:
                    with archive.open(name, "w") as file:
                        for _ in range(size >> 20):
                            file.write(b" " * (1 << 20))
                else:
                    archive.writestr(name, config)
        assert "bytes, which is too much" in bounded(tmp_path / "bomb.keras")
    with zipfile.ZipFile(tmp_path / "many.keras", "w") as archive:
        for index in range(5000):
            archive.writestr(f"{index}", b"")
    assert "more than 1024 members" in bounded(tmp_path / "many.keras")
    deep = '{"class_name": "Sequential", "config": {"layers": [' * 20_000
    write_keras(tmp_path / "deep.keras", sequential(keras_weights()), keras_config())
    with zipfile.ZipFile(tmp_path / "deep.keras", "w") as archive:
        archive.writestr("config.json", deep[:60_000])
        archive.writestr("model.weights.h5", b"")
    assert "config is not JSON" in bounded(tmp_path / "deep.keras")


# Messages


def onnx_of(*parts: bytes) -> bytes:
    return field(1, 9) + field(2, "x") + field(7, b"".join(parts) + field(12, field(1, "y")))


def onnx_node(op: str, inputs: list[str], output: str) -> bytes:
    return field(1, b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, op))


def onnx_tensor(name: str, shape: tuple[int, ...], data: bytes) -> bytes:
    dims = b"".join(field(1, length) for length in shape)
    return field(5, dims + field(2, 1) + field(8, name) + field(9, data))


ADD = onnx_node("GRU", ["x", "w", "r"], "g") + onnx_node("MatMul", ["g", "w"], "y")
ONNX: dict[str, bytes] = {
    "circle": onnx_of(onnx_node("Identity", ["z"], "y"), onnx_node("Identity", ["y"], "z"), ADD[:40]),
    "constant_circle": onnx_of(onnx_node("Identity", ["w"], "w"), ADD),
    "huge": onnx_of(onnx_tensor("w", (2**40, 2**40), b"1234"), ADD),
    "negative": onnx_of(onnx_tensor("w", (-4, -4), b"1" * 64), ADD),
    "repeated": onnx_of(
        onnx_tensor("c0", (250_000,), b"1" * 1_000_000),
        *(onnx_node("Concat", [f"c{index}"] * 60, f"c{index + 1}") for index in range(9)),
        onnx_node("Identity", ["c9"], "w"), ADD,
    ),
    "long_chain": onnx_of(*(onnx_node("Identity", [f"w{i}"], f"w{i + 1}") for i in range(9999)),
                          onnx_node("Identity", ["w9999"], "w"), ADD),
    "nodes": onnx_of(*[field(1, b"")] * 50_000),
    "names": onnx_of(field(1, b"".join(field(1, f"{index:02x}") for index in range(256)) * 4) * 400),
    "varint": b"\x08\x09\x12" + b"\xff" * 100,
    "nested": b"\x08\x09\x12\x01x\x3a" + b"\xff\xff\xff\xff\x7f",
}  # fmt: skip


@pytest.mark.parametrize("name", ONNX)
def test_onnx__circles_and_declared_sizes_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.onnx").write_bytes(ONNX[name])
    assert bounded(tmp_path / "m.onnx")


@pytest.mark.parametrize("piece", [b"[],", b'{"a":{}},', b'"\xf0\x9f\x98\x80",'])
def test_safetensors__a_long_header_is_refused(tmp_path: Path, piece: bytes) -> None:
    header = b'{"a":[' + piece * (1_000_000 // len(piece)) + b"0]}"
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "header would be" in bounded(tmp_path / "m.safetensors")


def test_graph__many_lists_of_texts_take_bounded_memory(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m")
    texts = b"".join(field(8, f"{index:03x}") for index in range(4000))
    value = field(1, "value") + field(2, field(8, field(1, 7) + texts))
    node = field(1, field(2, "Const") + field(5, value))
    path.write_bytes(field(1, 1) + field(2, field(2, node * 100)))
    assert bounded(path.parent) == ""


def test_index__prefixes_that_grow_are_refused(tmp_path: Path) -> None:
    grows = [(b"", field(1, 1))] + [(b"a" * length, b"") for length in range(1, 1500)]
    (tmp_path / "m.index").write_bytes(table_of(grows))
    (tmp_path / "m.data-00000-of-00001").write_bytes(b"1")
    assert "longer than in any model" in bounded(tmp_path / "m")


# HDF5


def hdf5_external_link(file: h5py.File, secret: Path) -> None:
    file["gru"] = h5py.ExternalLink(str(secret), "/")


def hdf5_soft_link(file: h5py.File, _: Path) -> None:
    file["gru"] = h5py.SoftLink("/elsewhere")


def hdf5_external_storage(file: h5py.File, secret: Path) -> None:
    file.create_dataset("gru/cell/vars/0", (4, 4), "f4", external=[(str(secret), 0, 64)])


def hdf5_virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "x", (4,))
    file.create_virtual_dataset("a", layout)


def hdf5_compressed(file: h5py.File, _: Path) -> None:
    file.create_dataset("a", (1 << 14, 1 << 12), "f4", compression="gzip", fillvalue=0)


def hdf5_declared(file: h5py.File, _: Path) -> None:
    file.create_dataset("a", (1 << 20, 1 << 14), "f4")  # no byte of it is written


def hdf5_circle(file: h5py.File, _: Path) -> None:
    group = file.create_group("a")
    group["a"] = group


def hdf5_many(file: h5py.File, _: Path) -> None:
    for index in range(5000):
        file.create_group(f"{index}")


HDF5: dict[str, tuple[Callable[[h5py.File, Path], None], str]] = {
    "external_link": (hdf5_external_link, "never followed"),
    "soft_link": (hdf5_soft_link, "never followed"),
    "external_storage": (hdf5_external_storage, "never opened"),
    "virtual": (hdf5_virtual, "never opened"),
    "compressed": (hdf5_compressed, "in chunks or compressed"),
    "declared": (hdf5_declared, "more than the file has"),
    "circle": (hdf5_circle, "contain themselves"),
    "many": (hdf5_many, "more than 4096 objects"),
}


@pytest.mark.parametrize("name", HDF5)
def test_hdf5__what_no_model_has_is_refused(tmp_path: Path, name: str) -> None:
    make, message = HDF5[name]
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 64)
    with h5py.File(tmp_path / "m.h5", "w") as file:
        make(file, secret)
    with pytest.raises(InvalidModelFile, match=message):
        read_foreign(tmp_path / "m.h5")


def test_hdf5__its_process_has_a_limit_of_memory_and_time() -> None:
    code = "from service.importing.hdf5_process import limit; limit(1000); bytes(1 << 30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stderr
    code = "import resource; from service.importing.hdf5_process import limit; limit(1000)"
    code += "; print(resource.getrlimit(resource.RLIMIT_CPU)[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 60
    assert resource.getrlimit(resource.RLIMIT_CPU)[0] != int(done.stdout)


# Other files


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"\x80\x02", b"\x08\x09\x12", b"{}" * 9]
)
def test_import__other_files_say_what_is_known(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.bin").write_bytes(data)
    assert bounded(tmp_path / "m.bin")


def test_import__folders_pipes_and_absent_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe", "absent", "absent/more"):
        with pytest.raises(InvalidModelFile):
            read_foreign(tmp_path / name)


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def test_torch__checkpoint_with_the_losses_of_every_step_is_read(tmp_path: Path) -> None:
    checkpoint = {
        "model_state_dict": {name: torch.from_numpy(array) for name, array in random_tensors(CONFIG).items()},
        "losses": [4.2 / step for step in range(1, 40_000)],
        "steps": list(range(20_000)),
        "text": "“Now is the winter of our discontent” — " * 10_000,
    }
    for is_zip in (True, False):
        torch.save(checkpoint, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
        assert bounded(tmp_path / "a.pt") == ""


def flattened(net: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return a state dict whose tensors are parts of one array, as CUDA arranges the weights of a GRU."""
    state = net.state_dict()
    flat = torch.cat([one.reshape(-1) for one in state.values()]).to(dtype)
    parts = flat.split([one.numel() for one in state.values()])
    return {name: part.view(one.shape) for (name, one), part in zip(state.items(), parts, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_zip", [True, False])
def test_torch__weights_in_one_array_are_read_once(tmp_path: Path, dtype: torch.dtype, is_zip: bool) -> None:
    net = nn.Module()
    net.emb, net.gru, net.out = nn.Embedding(V, 8), nn.GRU(8, 320, 4), nn.Linear(320, V)
    path = saved(tmp_path / "a.pt", flattened(net, dtype), _use_new_zipfile_serialization=is_zip)
    assert bounded(path) == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_import__half_precision_takes_bounded_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    net = nn.Module()
    net.emb, net.gru, net.out = nn.Embedding(V, 8), nn.GRU(8, 1024, 1), nn.Linear(1024, V)
    state = {name: one.to(dtype) for name, one in net.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    assert bounded(tmp_path / "a.safetensors") == ""
    assert bounded(saved(tmp_path / "a.pt", state)) == ""


def test_torch__tensors_that_overlap_are_not_multiplied(tmp_path: Path) -> None:
    units = 300
    flat = torch.ones(3 * units * units)
    state = {
        "emb.weight": torch.ones(V, units),
        "out.weight": torch.ones(V, units),
        "out.bias": torch.ones(V),
    }
    for index in range(8):
        for part in ("ih", "hh"):
            state[f"gru.weight_{part}_l{index}"] = flat.view(3 * units, units)
    assert "overlap" in bounded(saved(tmp_path / "a.pt", state))


def test_archive__members_that_expand_to_more_than_the_archive_together_are_refused(tmp_path: Path) -> None:
    units = 512
    net = nn.Module()
    net.emb, net.gru, net.out = (
        nn.Embedding(V, units),
        nn.GRU(units, units, 8),
        nn.Linear(units, V),
    )
    state = {name: torch.zeros_like(one) for name, one in net.state_dict().items()}
    whole = saved(tmp_path / "whole.pt", state)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("padding", np.random.default_rng(0).bytes(4 << 20))
    assert "expand" in bounded(tmp_path / "a.pt")
