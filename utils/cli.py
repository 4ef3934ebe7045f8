"""What all command lines share: a dataclass whose fields are flags, errors in one line, exit codes,
whole files."""

import contextlib
import dataclasses
import difflib
import math
import operator
import os
import sys


class UserError(Exception):
    """What the user can mend: told in one line, without a traceback, exit code 2."""


def reason(error):
    """The first line of an exception's message, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def no_memory(error):
    """Whether an exception says that there is no memory, the GPU's or the machine's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def replacing(path, *also):
    """A name to write to, which takes the place of `path` once all is written and on the disk.

    What was there stays whole if that fails, or if the machine stops at any moment. OSError (full
    disk, missing permission) and the exceptions `also` become a UserError. A link stays one; a
    device, /dev/stdout say, is written as it is.
    """
    target = os.path.realpath(path)
    device = os.path.exists(target) and not os.path.isfile(target)
    temporary = target if device else f"{target}.tmp"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        yield temporary
        if not device:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException as error:
        if not device:
            with contextlib.suppress(OSError):
                os.remove(temporary)
        if not isinstance(error, (OSError, *also)):
            raise
        raise UserError(
            f"cannot write {path}: {reason(error)}; what was there before is untouched"
        ) from None
    # the new name on the disk too, where the system can
    with contextlib.suppress(OSError, AttributeError):
        folder = os.open(os.path.dirname(target), os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def nearest(word, words, prefix=""):
    match = difflib.get_close_matches(str(word), list(words), 1)
    return f"; did you mean {prefix}{match[0]}?" if match else ""


# of a whole number whose field names no other: beyond, C integers overflow and memory is gone
MOST = 10**12


# limit of a field -> (what is wrong with a value, given the limit; in words)
LIMITS = {
    "low": (operator.lt, "must be at least"),
    "high": (operator.gt, "must be at most"),
    "above": (operator.le, "must be above"),
    "below": (operator.ge, "must be below"),
}


def field(default, help, group=None, choices=None, alias=None, ramp=None, **limits):
    """A dataclass field that is a flag. `group` starts a heading of --help, for this field and
    those after it; alias is an older name of it, which flags, experiments and checkpoints may use;
    ramp is the field that --key VALUE:VALUE gives its second value to.

    limits: low <= value <= high, above < value < below, what `check` allows where given.
    """
    assert limits.keys() <= LIMITS.keys(), limits
    about = {"help": help, "group": group, "choices": choices, "limits": limits, "alias": alias}
    return dataclasses.field(default=default, metadata=about | {"ramp": ramp})


def aliases(kind):
    """{older name: name} of the fields of the dataclass."""
    return {f.metadata["alias"]: f.name for f in dataclasses.fields(kind) if f.metadata["alias"]}


def check(config):
    """Complain of the first field of the dataclass `config` that is none of its choices or beyond
    its limits, so before anything is computed or memory taken. None, where it is the default,
    stands for a value that is found later."""
    for f in dataclasses.fields(config):
        choices, value = f.metadata["choices"], getattr(config, f.name)
        if value is None:
            continue
        if choices and value not in choices:
            raise UserError(
                f"{f.name}={value} is not one of {', '.join(choices)}{nearest(value, choices)}"
            )
        if f.type not in (int, float):
            continue
        usual = {"high": MOST} if f.type is int else {}
        for limit, bound in (usual | f.metadata["limits"]).items():
            wrong, words = LIMITS[limit]
            if wrong(value, bound):
                shown = f"{bound:,}" if f.type is int else f"{bound:g}"
                raise UserError(f"{f.name}={value} {words} {shown}")


def refuse(config, names, why):
    """Complain of the settings called `names` of the dataclass `config`."""
    raise UserError(f"{', '.join(f'{name}={getattr(config, name)}' for name in names)}: {why}")


def check_name(kind, name, known):
    """Complain where there is no `kind` (say, sampler) called `name`; known is its dictionary."""
    if name not in known:
        raise UserError(
            f"there is no {kind} {name}{nearest(name, known)}; known: {', '.join(known)}"
        )


def check_needs(family, settings):
    """Complain of the first of the settings (a dataclass) that the family cannot have: family.needs
    is a table {setting: allowed values}, family.why {setting: why so}."""
    for name, allowed in family.needs.items():
        value = getattr(settings, name, allowed[0])
        if value not in allowed:
            why = family.why.get(name)
            raise UserError(
                f"{name}={value} with {family.name}: it needs "
                f"{name}={' or '.join(map(str, allowed))}" + (f", since {why}" if why else "")
            )


def convert(f, text):
    """The string `text` as the type of dataclass field `f`."""
    if f.type is bool:
        if text.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            return text.lower() in ("true", "1", "yes", "on")
        raise UserError(f"--{f.name} {text}: expected true or false")
    try:
        value = f.type(text)
        if f.type is float and not math.isfinite(value):
            raise ValueError
        return value
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[f.type]
        raise UserError(f"--{f.name} {text}: expected {kind}") from None


def parse(argv, kind):
    """Command line -> (positional arguments, overrides): `--key value`, `--key=value`, `--bool`; -
    and _ are one."""
    fields, older = {f.name: f for f in dataclasses.fields(kind)}, aliases(kind)
    positional, overrides, rest = [], {}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        key = older.get(key, key)
        positive = fields.get(key.removeprefix("no_"))
        if key not in fields and positive and positive.type is bool:  # --no-clean-mojibake
            if equals:
                raise UserError(
                    f"--{word[2:]}: give --{positive.name}={value} or --no-{positive.name}"
                )
            overrides[positive.name] = False
            continue
        if key not in fields:
            raise UserError(
                f"unknown flag {word.split('=')[0]}{nearest(key, fields, '--')} (--help shows all)"
            )
        if not equals:
            if fields[key].type is bool and (not rest or rest[0].startswith("--")):
                value = "true"
            elif not rest:
                raise UserError(f"{word} needs a value")
            else:
                value = rest.pop(0)
        if (last := fields[key].metadata["ramp"]) and ":" in value:
            value, overrides[last] = value.split(":", 1)
            overrides[last] = convert(fields[last], overrides[last])
        overrides[key] = convert(fields[key], value)
    return positional, overrides


def merge(kind, *layers):
    """A `kind` from dicts, later ones first in rank; a name that it does not have is an error."""
    fields, older, values = {f.name: f for f in dataclasses.fields(kind)}, aliases(kind), {}
    for key, value in (item for layer in layers for item in ramped(fields, layer).items()):
        key = older.get(key, key)
        if key not in fields:
            raise UserError(f"there is no setting {key}{nearest(key, fields)}")
        optional = value is None and fields[key].default is None
        values[key] = None if optional else typed(fields[key], value)
    return kind(**values)


def ramped(fields, layer):
    """A layer of `merge` in which a value of one end resets the other that it does not name."""
    other = {name: f.metadata["ramp"] for name, f in fields.items() if f.metadata["ramp"]}
    reset = {last: None for name, last in other.items() if name in layer and last not in layer}
    return layer | reset


def typed(f, value):
    """A value of any origin as one of dataclass field `f`, of whose type it must be."""
    wanted = (int, float) if f.type is float else f.type
    if not isinstance(value, wanted) or isinstance(value, bool) != (f.type is bool):
        shown = " ".join(repr(value).split())[:60]
        raise UserError(f"{f.name}={shown} must be of type {f.type.__name__}")
    if f.type is str and ("\0" in value or value.encode(errors="replace").decode() != value):
        raise UserError(
            f"{f.name}={value!r} is no text: it has a NUL character, or bytes that are not UTF-8"
        )
    if f.type is int and value.bit_length() > 1000:  # Python does not even print it
        raise UserError(f"{f.name} is a number of {value.bit_length()} bits, which is too large")
    if f.type is not float:
        return value
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise UserError(f"{f.name}={value} must be a finite number")
    return value


def show_help(kind, usage):
    lines = [usage]
    for f in dataclasses.fields(kind):
        if f.metadata["group"]:
            lines.append(f"\n{f.metadata['group']}:")
        choices = f" [{'|'.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        default = "" if f.default in ("", None) else f" (default {f.default})"
        lines.append(f"  --{f.name:<18} {f.metadata['help']}{choices}{default}")
    print("\n".join(lines))


def duration(seconds):
    """12 s, 3 min 20 s, 2 h 05 min"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return (
        f"{minutes} min {seconds:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def command(kind, run, usage, unexpected=None, lists=None):
    """The main(argv) of a script: calls run(positional arguments, overrides), whose flags are the
    fields of the dataclass kind.

    unexpected  what to say where there is a positional argument and may be none
    lists       function that shows what --list does
    """

    def main(argv):
        if "--help" in argv or "-h" in argv:
            return show_help(kind, usage)
        if lists and "--list" in argv:
            return lists()
        positional, overrides = parse(argv, kind)
        if positional and unexpected:
            raise UserError(f"what is {positional[0]}? {unexpected.format(positional[0])}")
        return run(positional, overrides)

    return main


def run(main):
    """Call main(sys.argv[1:]) as a script does; what the user can mend ends in one line and exit
    code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        rank = os.environ.get("RANK", "0")  # torchrun's number of this process
        line = " ".join(str(error).split())  # a name in a file may have line breaks
        print(f"{'' if rank == '0' else f'process {rank}: '}error: {line}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not no_memory(error):
            raise
        print(
            "error: too little memory for this; ask for less at once. In training: a smaller "
            "--micro_batch, --batch_size or network, or --activation_checkpointing true; in "
            f"generation: fewer or shorter texts ({reason(error)})",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python inference.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
