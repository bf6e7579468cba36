"""What every command shares: flags made from its settings, one-line errors with an exit code, an end at once on signals."""

from __future__ import annotations

import difflib
import errno
import os
import re
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from absl import app, flags, logging

from gdiff_jax import options
from gdiff_jax.commands import help, streams
from gdiff_jax.errors import ConfigError, RunError, need
from gdiff_jax.files import cache_folder, shown

C = TypeVar("C")
Others = Mapping[str, Callable[[list[str]], None]]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def define_flags(defaults: Any) -> None:
    """One absl flag for each option of `defaults` (see `gdiff_jax.options`), with its type, default and help."""
    for owner, field in options.leaves(defaults):
        name, default, text = field.name, getattr(owner, field.name), field.metadata["help"]
        kind = _without_none(typing.get_type_hints(type(owner))[name])
        if typing.get_origin(kind) is tuple:
            parser = _TupleParser(typing.get_args(kind)[0], field.metadata["bare"])
            flag = flags.Flag(parser, flags.CsvListSerializer(","), name, default, text)
            flag.boolean = field.metadata["bare"] is not None  # what lets absl take `--name` without a value
            flags.DEFINE_flag(flag)
        else:
            define: dict[type, Callable[..., Any]] = {
                bool: flags.DEFINE_bool,
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
                str: flags.DEFINE_string,
            }
            define[kind](name, default, text)


def _without_none(kind: Any) -> Any:
    """`T` of `T | None`."""
    if isinstance(kind, types.UnionType):
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
    return kind


class _TupleParser(flags.ArgumentParser):
    """`a,b,c` to a tuple."""

    syntactic_help = "values separated by commas"

    def __init__(self, of: type, bare: tuple[Any, ...] | None):
        super().__init__()
        self.of = of
        self.bare = bare

    def parse(self, argument: Any) -> tuple[Any, ...]:
        if not isinstance(argument, str):
            return tuple(argument)
        if self.bare is not None and argument == "true":  # what absl passes for a flag without a value
            return self.bare
        parts = [part.strip() for part in argument.split(",") if part.strip()]
        if not parts:  # such as --sigma_grid=$GRID where there is no GRID
            raise ValueError("no value stands after the =; give some, separated by commas, or leave the flag out")
        if self.of is not str and any(re.match(r"[+-]?0[0-9]|.*_", part) for part in parts):
            raise ValueError(f"{argument!r}: a comma separates values and a point their decimals, as in 0,0.01,0.1")
        try:
            return tuple(self.of(part) for part in parts)
        except ValueError:
            raise ValueError(f"{argument!r} is not a list of {self.of.__name__} separated by commas") from None

    def flag_type(self) -> str:
        return f"list of {self.of.__name__}"


def read_flags(defaults: C) -> C:
    """`defaults` with the values of the parsed flags; ~ is the user's home, which no shell puts in place after a =.

    Raises:
      ConfigError: where a flag was given an empty text, such as --images=$IMAGES where there is no IMAGES.
    """
    values = {name: flags.FLAGS[name].value for name in options.flat(defaults)}
    for name, value in values.items():
        if isinstance(value, str):
            need(value.strip() or not given(name), f"--{name}: no value stands after the =; give one, or leave the flag out")
            values[name] = os.path.expanduser(value)
    return options.replace(defaults, **values)


def command(
    main: Callable[[], None],
    *settings: Any,
    text: str | None,
    usual: tuple[str, ...] = (),
    others: Others = types.MappingProxyType({}),
    word: str = "",
) -> None:
    """`run` with the flags of these settings; --help begins with this text, then has the `usual` ones."""
    for defaults in settings:
        define_flags(defaults)
    help.install(lambda: help.page(text, settings, usual))
    run(main, others, word)


def given(name: str) -> bool:
    """Whether a flag was said, be it with its default."""
    return flags.FLAGS[name].present > 0


def run(main: Callable[[], None], others: Others = types.MappingProxyType({}), word: str = "") -> None:
    """Parses the flags and calls main; bad input ends with one line on stderr and exit code 2.

    Where the first word that is no flag is one of `others`, that is called in its place, with the words after it. With `word`,
    the name of a flag, one word that is no flag is that flag's value.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            near = [f"--{name}" for name in re.findall(r"\w+", str(error).partition("Did you mean:")[2])]
            _fail(f"--{error.flagname} is not a flag{_meant(near)} (--help lists the flags)")
        except flags.Error as error:
            _fail(f"{str(error).splitlines()[0]} (--help lists the flags)")
        for value in [text for text in rest[1:] if not _forgot_dashes(text)] if word else []:
            if given(word):
                _fail(f"{value!r} is one too many: --{word} is {flags.FLAGS[word].value!r}; quote a name with spaces")
            flags.FLAGS[word].parse(value)
            flags.FLAGS[word].present += 1
            rest.remove(value)
        if len(rest) > 1 and rest[1] not in others:
            near = [f"--{rest[1]}"] if _forgot_dashes(rest[1]) else difflib.get_close_matches(rest[1], others)
            _fail(f"{rest[1]!r} is not a flag; flags are written --name=value{_meant(near)} (--help lists them)")
        return rest

    def guarded(rest: list[str]) -> None:
        keep_compiled()
        from gdiff_jax import numerics  # not with the module, as JAX: --help need not wait for it

        allow_transfers()
        try:
            with numerics.without_debugging(_say):
                others[rest[1]](rest[2:]) if len(rest) > 1 else main()
        except ConfigError as error:
            _fail(str(error))
        except RunError as error:
            _fail(str(error), 1)
        except OSError as error:
            where = f" at {error.filename}" if error.filename else ""
            if error.errno in NO_SPACE:
                _fail(f"{error.strerror}{where}; what is finished is kept. Free space and give the same command again", 1)
            if not where:
                raise
            _fail(f"{error.strerror}{where}; what is finished is kept, and the same command goes on from there", 1)

    streams.steady()
    end_at_once_on_signals()
    logging.set_verbosity(logging.WARNING)  # jax and orbax tell each step of theirs at INFO
    app.run(guarded, flags_parser=parse)


def _forgot_dashes(text: str) -> bool:
    """Whether a word is NAME=VALUE of a flag, and no file of that name is there."""
    return text.partition("=")[0] in flags.FLAGS and not os.path.exists(text)


def _meant(near: list[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def leave(code: int) -> typing.NoReturn:
    """Ends the process; one of several without JAX's farewell, which waits for those that may be dead."""
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def end_at_once_on_signals() -> None:
    """Ctrl-C and SIGTERM (a machine that is taken away) end the process at once: what is on disk is whole at any moment.

    A handler of Python's own would wait for the main thread to come back from XLA, minutes where the prior is large, and a
    KeyboardInterrupt would be swallowed where it meets a callback of JAX. So a thread waits for the signals.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: _end(number))
    receive, send = os.pipe()
    os.set_blocking(send, False)
    signal.set_wakeup_fd(send)
    threading.Thread(target=lambda: _end(os.read(receive, 1)[0]), daemon=True).start()


def _end(number: int) -> None:
    os.write(2, b"\ninterrupted; the same command goes on from here\n")
    os._exit(128 + number)


def keep_compiled() -> None:
    """Compiled programs are kept in the user's cache folder, unless JAX was told of another one, or of none."""
    import jax  # not with the module: --help need not wait for it

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # mypy does not see what JAX sets
        folder = cache_folder()
        if folder is None:
            _say("no cache folder can be written to, so each start compiles anew; GDIFF_JAX_CACHE=FOLDER names one")
            return
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        # Small ones too: a start compiles a hundred of them, for initial weights and the like, five seconds in all.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def allow_transfers() -> None:
    """Arrays go to the devices and back, whatever JAX_TRANSFER_GUARD says, which is of use where a loop should not do that."""
    import jax

    if jax.config.jax_transfer_guard not in (None, "allow"):  # type: ignore[attr-defined]
        _say("JAX_TRANSFER_GUARD is set aside: images and results go to the devices and back")
        jax.config.update("jax_transfer_guard", "allow")


def need_devices() -> None:
    """Starts JAX's devices; call it after whatever must be said to JAX before.

    Raises:
      ConfigError: where the platform that JAX was told to use is not there.
    """
    import jax

    try:
        jax.local_devices()
    except Exception as error:  # JAX raises many types for a platform that it cannot start, some without a word
        asked, older = jax.config.jax_platforms, os.environ.get("JAX_PLATFORM_NAME")  # type: ignore[attr-defined]
        said = f"JAX_PLATFORM_NAME={older}" if older else f"JAX_PLATFORMS={asked or 'unset'}"
        raise ConfigError(
            f"JAX cannot start its devices, {said}: {str(error) or type(error).__name__}; "
            + (f"unset {said.partition('=')[0]}; " if older else "")
            + "JAX_PLATFORMS=cpu runs on the CPU, and the empty one takes what there is"
        ) from None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail(message: str, code: int = 2) -> typing.NoReturn:
    _say(f"error: {' '.join(shown(message).split())}")
    leave(code)
