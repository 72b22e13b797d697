"""Carry records of commit 9514502 over to today's form.

    python convert_records.py PROJECT FILE...

They come into figures/published of the project's folder, with the identity that a run of today's
code has: the network is built from the settings of the record.
"""

import base64
import io
import json
import sys
import zlib
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(sys.argv[1]).resolve()))
import ex3_convnet  # noqa: E402
import ex3_pretrained  # noqa: E402
import utils  # noqa: E402

WORDS = {True: "imagenet", False: "none"}


def unpack(text):
    """The array that the old code made a text."""
    return np.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), allow_pickle=False)


def convert(old):
    """The script that a record is of, and the record in today's form."""
    recipe, classes = old["recipe"], old["recipe"]["data"]["classes"]
    script = ex3_convnet if recipe["script"] == "ex3_convnet.py" else ex3_pretrained
    settings = {name: 0 if value is None else value for name, value in recipe["flags"].items()}
    if "pretrained" in settings and isinstance(settings["pretrained"], bool):
        settings["pretrained"] = WORDS[settings["pretrained"]]
    flags = utils.parse_flags(vars(script), []).replace(**settings, seed=old["seed"])
    model = script.build(flags, len(classes))
    data = SimpleNamespace(
        fingerprint=recipe["data"]["fingerprint"], mean=torch.tensor(script.MEAN),
        std=torch.tensor(script.STD),
        **{part: range(recipe["data"][part]) for part in ("train", "val", "test")})
    labels, predicted = (unpack(part["test"]).astype(int) for part in (
        old["labels"], old["predictions"]["reported"]))
    confusion = np.bincount(labels * len(classes) + predicted, minlength=len(classes)**2)
    confusion = confusion.reshape(len(classes), -1)
    assert abs(confusion.trace() / confusion.sum() - old["result"]["test_accuracy"]) < 1e-9
    filters = {when: unpack(text).astype(np.float16) for when, text in old["filters"].items()}
    code = old["code"] or {"commit": "", "changed": []}
    finished = datetime.strptime(old["finished"], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    return flags, {
        "title": script.describe(flags)[0], "data": old["data"], "classes": classes,
        "seed": old["seed"], "identity": utils.make_identity(
            flags, data, recipe.get("pretrained"), model, *script.make_optimizer(model, flags)),
        "result": old["result"], "history": old["history"], "confusion": confusion.tolist(),
        "filters": {when: [base64.b64encode(np.ascontiguousarray(part)).decode(), part.shape]
                    for when, part in filters.items()},
        "pretrained": Path(settings.get("pretrained", "none")).name,
        "precision": old["precision"], "compile": old["where_and_how"].get("compile", False) if (
            "where_and_how" in old) else False,
        "device": old["device"], "torch": old["versions"]["torch"],
        "commit": code["commit"][:7] + "-dirty" * bool(code["changed"]),
        "finished": finished.isoformat()}


for file in sys.argv[2:]:
    flags, record = convert(json.loads(Path(file).read_text(encoding="utf-8")))
    name = utils.record_name(record["title"], record["identity"], record["seed"])
    utils.write_record(utils.FOLDER / "figures/published" / utils.slug(record["data"])
                       / flags.script / "records" / f"{name}.json", record)
