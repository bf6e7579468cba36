"""Converted weights on disk, by orbax, beside a JSON that says what they are; a damaged entry is never used.

    CACHE/KEY/params/       orbax
    CACHE/KEY/about.json    source, revision, sha256 of the weight file, converter version, config, digest of the params

The key is a digest of the weight file, the config and the converter's version, so an entry is never out of date.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gdiff_jax import modules
from gdiff_jax.files import cache_folder
from gdiff_jax.modules import Params
from gdiff_jax.priors.unet2d_config import UNet2DConfig
from gdiff_jax.priors.weights import CONVERTER_VERSION


def cached(spec: modules.Spec, convert: Callable[[], Params], about: dict[str, Any]) -> Params:
    """The params of an entry, or those that `convert` makes, which then become the entry.

    Args:
      spec: the network.
      convert: reads and converts the weight file.
      about: source, revision and sha256 of the weight file.
    """
    folder = cache_folder()
    if folder is None:
        warnings.warn("the converted weights could not be kept: there is no cache folder to write to", stacklevel=2)
    if folder is None or jax.process_count() > 1:  # orbax would take the hosts' own disks for one that they share
        return convert()
    import orbax.checkpoint as ocp  # not at the start, which need not wait: a bundled prior is not kept here

    about = {**about, "converter": CONVERTER_VERSION, "config": repr(spec)}
    key = hashlib.sha256(json.dumps([about["sha256"], about["converter"], about["config"]]).encode()).hexdigest()[:32]
    entry = folder / key
    if os.path.exists(entry):
        try:
            note = json.loads((entry / "about.json").read_text(encoding="utf-8"))
            with ocp.StandardCheckpointer() as checkpointer:
                params = checkpointer.restore(entry / "params", modules.restore_target(spec))
            if modules.digest(params) != note["params_sha256"]:
                raise ValueError("the digest of the params differs")
            return params
        except Exception as error:  # orbax raises many types for a folder that is not what it says
            warnings.warn(f"the cache entry {entry} is damaged ({error}); converting again", stacklevel=2)
            shutil.rmtree(entry, ignore_errors=True)
    params = convert()
    try:
        _write(entry, params, about)
    except Exception as error:  # OSError, and what orbax makes of a full disk
        warnings.warn(f"the converted weights could not be kept in {entry} ({error})", stacklevel=2)
    return params


def _write(entry: Path, params: Params, about: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=entry.parent))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / "params", params)
            checkpointer.wait_until_finished()
        (partial / "about.json").write_text(
            json.dumps({**about, "params_sha256": modules.digest(params)}, indent=2) + "\n", encoding="utf-8"
        )
        if not entry.exists():  # another process may have been quicker
            os.replace(partial, entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def latest_ema(checkpoints: Path, spec: UNet2DConfig) -> tuple[Params, str]:
    """The moving average of the newest checkpoint of a training run, and its digest.

    Raises:
      ValueError: where there is none, or it is damaged or of another network.
    """
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(checkpoints.absolute(), options=ocp.CheckpointManagerOptions(read_only=True))
    step = manager.latest_step()
    if step is None:
        raise ValueError(f"{checkpoints} holds no checkpoint yet")
    try:
        about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if UNet2DConfig.from_diffusers(about["config"]) != spec:  # an older version wrote fewer fields
            raise ValueError("it was trained with another config.json")
        item = {"ema": modules.restore_target(spec)}
        restore = ocp.args.PyTreeRestore(item, ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True)
        params = manager.restore(step, args=ocp.args.Composite(state=restore))["state"]["ema"]
        digest = modules.digest(params)
        if digest != about["ema_sha256"]:
            raise ValueError("the digest of its moving average differs")
    except Exception as error:  # orbax raises many types for a folder that is not what it says
        raise ValueError(f"checkpoint {checkpoints / str(step)} cannot be read ({error})") from None
    return params, digest
