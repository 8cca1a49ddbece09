"""The command `dsjax`: parse, call, print.

Every command imports what it needs when it runs, so that `--help` is quick. A mistake
of the user's is one line on stderr and exit code 2; an interrupt is 130. With `--json`,
stdout holds one JSON object and nothing else.
"""

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import dsjax
from dsjax.errors import UserError

# Device files of NVIDIA GPUs (dxg: under Windows), of TPUs (two generations of driver)
# and of AMD GPUs.
ACCELERATORS = ("nvidia*", "dxg", "accel*", "vfio/[0-9]*", "kfd")


class Parser(argparse.ArgumentParser):
    """A parser whose help ends with an example and whose errors are one line."""

    def __init__(self, *, example: str, **kwargs) -> None:
        super().__init__(
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def error(self, message: str) -> None:
        """Print the message without the usage, exit with 2."""
        self.exit(2, f"dsjax: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = parser().parse_args(argv)
    _stay_on_cpu_without_accelerator()
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("dsjax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        print("dsjax:", " ".join(message.split()), file=sys.stderr)
        return 2
    return 0


def _explain(error: Exception) -> str | None:
    """One line for what the user or the machine did; None for a defect of ours."""
    match error:
        case UserError():
            return str(error)
        case OSError(filename=path, strerror=reason) if path and reason:
            return f"{path}: {reason}"
        case OSError():
            return str(error)
    disk_full = os.strerror(errno.ENOSPC)  # as array stores word it, inside their own
    return disk_full if disk_full in str(error) else None


def _stay_on_cpu_without_accelerator() -> None:
    """Without an accelerator, spare the user the complaints of JAX's plug-ins."""
    devices = Path("/dev")
    if sys.platform == "linux" and not any(
        match for pattern in ACCELERATORS for match in devices.glob(pattern)
    ):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def parser() -> Parser:
    """The command line: one subparser a command, each with its function as `run`."""
    top = Parser(
        prog="dsjax",
        description="The DeepSeek family of models as one Transformer in JAX.",
        example="dsjax quickstart",
    )
    top.add_argument("--version", action="version", version=dsjax.__version__)
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_quickstart,
        _add_train,
        _add_inspect,
        _add_plan,
        _add_tokenize,
        _add_convert,
        _add_export,
        _add_generate,
        _add_eval,
        _add_scaling,
    ):
        add(commands)
    return top


def _command(
    commands: argparse._SubParsersAction, run: Callable, *, example: str
) -> Parser:
    """A subparser called after `run`, described by its docstring."""
    command = commands.add_parser(
        run.__name__.strip("_"),
        help=run.__doc__.partition(".")[0],
        description=" ".join(run.__doc__.split()),
        example=example,
    )
    command.set_defaults(run=run)
    return command


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


# --- quickstart


def _quickstart(args: argparse.Namespace) -> None:
    """Train a tiny V3, save, export, convert back, evaluate, generate.

    The text is the Python standard library's own source.
    """
    from dsjax.quickstart import quickstart

    quickstart(out=args.out, steps=args.steps, force=args.force)


def _add_quickstart(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, _quickstart, example="dsjax quickstart")
    command.add_argument(
        "--out", default="quickstart", metavar="DIR", help="(default: ./quickstart)"
    )
    command.add_argument("--steps", type=_positive, help="training steps")
    command.add_argument("--force", action="store_true", help="replace DIR")


# --- train


def _train(args: argparse.Namespace) -> None:
    """Run an experiment: pre-training from text to a model.

    Killed or stopped, it goes on with --resume as if nothing had happened.
    """
    from dsjax import hosts

    hosts.start(
        coordinator=args.coordinator,
        processes=args.processes,
        process_id=args.process_id,
    )
    from dsjax.train.override import find, override
    from dsjax.train.run import train

    experiment = find(args.experiment)
    for setting in args.set:
        experiment = override(experiment, setting)
    hosts.simulate(experiment.mesh.devices)
    result = train(
        experiment,
        out=args.out or Path("runs") / experiment.name,
        resume=args.resume,
        fallback=args.fallback,
        steps=args.steps,
        profile=args.profile,
    )
    if result.pop("first"):
        print(json.dumps(result) if args.json else _report(result))
    if result["stopped"] == "SIGINT":
        raise KeyboardInterrupt


def _report(result: dict) -> str:
    lines = [
        f"{result['step']} of {result['steps']} steps, {result['tokens']:,} tokens"
    ]
    if result["bits_per_byte"] is not None:
        lines.append(
            f"held out: {result['held_out_loss']:.4f} nats/token, "
            f"{result['bits_per_byte']:.4f} bits/byte"
        )
    if result["skipped"]:
        lines.append(f"{result['skipped']} steps were not finite and changed nothing")
    if result["model"] is None:
        lines.append(f"saved {result['checkpoint']}; --resume goes on")
    else:
        lines.append(f"model: {result['model']}")
    return "\n".join(lines)


def _add_train(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        _train,
        example="dsjax train experiments.pretrain_tiny_v3 --set learning_rate.peak=2e-3",
    )
    command.add_argument(
        "experiment",
        metavar="PACKAGE.FUNCTION",
        help="a function that returns an Experiment",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="replace a field: model.segments.1.feed_forward.top_k=4",
    )
    command.add_argument(
        "--out", metavar="DIR", help="the run's directory (default: runs/NAME)"
    )
    command.add_argument("--resume", action="store_true", help="go on with that run")
    command.add_argument(
        "--fallback",
        action="store_true",
        help="where the newest checkpoint cannot be read, use the one before",
    )
    command.add_argument(
        "--steps", type=_positive, metavar="N", help="stop early, after step N"
    )
    command.add_argument(
        "--profile", action="store_true", help="trace three steps for XProf"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    hosts = command.add_argument_group(
        "several processes", "a TPU pod, Slurm and Open MPI need none of these"
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    hosts.add_argument("--processes", type=_positive, metavar="N")
    hosts.add_argument("--process-id", type=int, metavar="I", help="from 0")


# --- inspect


def _inspect(args: argparse.Namespace) -> None:
    """Count a model's parameters, cache bytes and FLOPs a token.

    Its configuration is enough; no weight is read.
    """
    from dsjax import count

    config = count.find(args.model)
    counted = count.count(config, context=args.context)
    print(json.dumps(counted.as_dict()) if args.json else count.table(config, counted))


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, _inspect, example="dsjax inspect v3")
    command.add_argument("model", help="a published name, or a checkpoint directory")
    command.add_argument(
        "--context",
        type=_positive,
        metavar="TOKENS",
        help="positions that a token attends to, for its FLOPs (default: 4096)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


# --- plan


def _plan(args: argparse.Namespace) -> None:
    """Compile a model for a pod that is not here: memory, FLOPs, collectives, bounds.

    Runs on any CPU. Needs the TPU compiler (pip install 'dsjax[tpu]') or, for h200, the
    CUDA plug-in.
    """
    from dsjax.plan import environment

    environment.prepare()
    from dsjax.plan.command import plan
    from pallas_kernels import reference_only

    with reference_only(args.no_kernels):
        plan(args)


def _sequences(text: str) -> Fraction:
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _add_plan(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        _plan,
        example="dsjax plan v3 --topology v5p:8x8x8 --mode train --mesh "
        "fsdp=64,expert=8 --batch-per-device 1 --length 2048",
    )
    command.add_argument("model", help="a published name, or a checkpoint directory")
    command.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5e:4x4, v5p:8x8x8, v6e:8x8, tpu7x:2x2x2 (chips) or h200:8",
    )
    command.add_argument(
        "--mode",
        choices=("train", "prefill", "decode"),
        default="train",
        help="(default: train)",
    )
    command.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="devices along data, fsdp, expert, tensor; auto compiles the most promising "
        "and ranks them (default: the most promising by estimate)",
    )
    command.add_argument(
        "--batch-per-device",
        type=_sequences,
        default=Fraction(1),
        metavar="N",
        help="sequences, times all devices; 1/8 is one for eight devices (default: 1)",
    )
    command.add_argument(
        "--length",
        type=_positive,
        metavar="TOKENS",
        help="of a sequence, or of the cache (default: 4096, or all the model can see)",
    )
    _add_cache_dtype(command, "bfloat16")
    command.add_argument(
        "--no-kernels",
        action="store_true",
        help="plain JAX in their place, to see what they are worth",
    )
    train = command.add_argument_group("training")
    train.add_argument(
        "--remat",
        default="full",
        metavar="WHAT",
        help="computed again instead of kept: none, full, v3, ... (default: full)",
    )
    train.add_argument(
        "--no-mtp", action="store_true", help="leave the MTP module untrained"
    )
    train.add_argument(
        "--moments",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="the optimizer's (default: bfloat16)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument(
        "--hlo", metavar="FILE", help="also write the compiled program there"
    )


# --- tokenize


def _tokenize(args: argparse.Namespace) -> None:
    """Turn text, JSONL or Parquet into token shards to train on.

    A file of another kind is one document; a directory stands for all files below it.
    With --held-out-percent, OUT/train and OUT/held_out.
    """
    from dsjax.data.tokenize import tokenize_files

    written = tokenize_files(
        args.files,
        args.out,
        bpe=args.train_bpe,
        tokenizer=args.tokenizer,
        field=args.text_field,
        workers=args.workers,
        shard_tokens=args.shard_tokens,
        held_out_percent=args.held_out_percent,
    )
    for name, index in written.items():
        print(
            f"{Path(args.out, name)}: {index.documents:,} documents, "
            f"{index.bytes:,} bytes, {index.tokens:,} tokens of {index.vocab_size:,}, "
            f"{index.bytes / index.tokens:.2f} bytes a token"
        )


def _add_tokenize(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        _tokenize,
        example="dsjax tokenize web/*.jsonl.zst shards --train-bpe 32000 "
        "--held-out-percent 1",
    )
    command.add_argument(
        "files", nargs="+", metavar="FILES", help="files, and directories of them"
    )
    command.add_argument("out", metavar="OUT", help="a directory that does not exist")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--train-bpe", type=_positive, metavar="N", help="first train a BPE of N ids"
    )
    which.add_argument(
        "--tokenizer", metavar="PATH", help="a directory, or its tokenizer.json"
    )
    command.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="of JSONL objects, or the Parquet column (default: text)",
    )
    command.add_argument(
        "--workers", type=_positive, metavar="N", help="processes (default: the cores)"
    )
    command.add_argument(
        "--shard-tokens",
        type=_positive,
        default=2**28,
        metavar="N",
        help="tokens a shard, at most (default: 2^28)",
    )
    command.add_argument(
        "--held-out-percent",
        type=float,
        default=0.0,
        metavar="P",
        help="of the documents, whole ones, chosen by a hash of their text (default: 0)",
    )


# --- convert, export


def _convert(args: argparse.Namespace) -> None:
    """Convert a Hugging Face checkpoint into an Orbax one.

    FP8 blocks are dequantised on the way.
    """
    from dsjax import checkpoint

    checkpoint.convert(args.hf_dir, args.out, dtype=args.dtype)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands, _convert, example="dsjax convert DeepSeek-V2-Lite v2-lite"
    )
    command.add_argument("hf_dir", metavar="HF_DIR", help="directory or gs:// path")
    command.add_argument("out", metavar="OUT", help="a directory that does not exist")
    _add_dtype(command, "of the weights written (default: as they are; FP8: bfloat16)")


def _export(args: argparse.Namespace) -> None:
    """Export an Orbax checkpoint as a Hugging Face one.

    Whatever reads safetensors reads it.
    """
    from dsjax import checkpoint

    checkpoint.export(args.orbax_dir, args.out, dtype=args.dtype)


def _add_export(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, _export, example="dsjax export v2-lite v2-lite-hf")
    command.add_argument(
        "orbax_dir", metavar="ORBAX_DIR", help="what convert or save wrote"
    )
    command.add_argument("out", metavar="OUT", help="a directory that does not exist")
    _add_dtype(command, "of the weights written (default: as they are)")


# --- generate, eval


def _add_dtype(command: Parser, help: str) -> None:
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help=help)


def _add_cache_dtype(command: Parser, default: str) -> None:
    command.add_argument(
        "--cache-dtype",
        choices=("float32", "bfloat16", "float8_e4m3fn"),
        help="of keys and values kept; float8_e4m3fn is for MLA's latents "
        f"(default: {default})",
    )


def _add_model(command: Parser) -> None:
    command.add_argument(
        "checkpoint", metavar="CKPT", help="a Hugging Face or an Orbax directory"
    )
    _add_dtype(command, "of weights and arithmetic (default: the checkpoint's)")
    command.add_argument(
        "--mesh",
        default="",
        metavar="AXIS=N,...",
        help="devices along data, fsdp, expert, tensor: fsdp=2,expert=4 (default: 1)",
    )


def _load(args: argparse.Namespace):
    from dsjax.sharding import parse_mesh

    mesh = parse_mesh(args.mesh)
    return dsjax.load(args.checkpoint, dtype=args.dtype, mesh=mesh, progress=True)


def _generate(args: argparse.Namespace) -> None:
    """Continue a prompt, or answer it.

    The text appears as it is made.
    """
    from dsjax.decode.generate import stream

    model = _load(args)
    for text in stream(
        model,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        chat=args.chat,
        system=args.system,
        cache_dtype=args.cache_dtype,
    ):
        print(text, end="", flush=True)
    print()


def _add_generate(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        _generate,
        example="dsjax generate v2-lite --chat --prompt 'Why is the sky blue?' "
        "--temperature 0.6 --top-p 0.95",
    )
    _add_model(command)
    command.add_argument("--prompt", required=True)
    command.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N")
    command.add_argument(
        "--temperature", type=float, default=0.0, help="0: greedy (default)"
    )
    command.add_argument("--top-p", type=float, default=1.0, help="(default: 1, all)")
    command.add_argument("--top-k", type=int, default=0, help="(default: 0, all)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--chat", action="store_true", help="put the prompt in the chat template"
    )
    command.add_argument("--system", metavar="TEXT", help="system prompt, with --chat")
    _add_cache_dtype(command, "the model's")


def _eval(args: argparse.Namespace) -> None:
    """Measure a model on text files.

    Prints nats and bits a byte, and perplexity a token.
    """
    from dsjax.eval import perplexity

    texts = perplexity.read(args.data)  # a wrong path shows before a model is loaded
    result = perplexity.evaluate(
        _load(args),
        texts,
        length=args.length,
        stride=args.stride,
        batch=args.batch,
    )
    print(json.dumps(result.as_dict()) if args.json else result)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        _eval,
        example="dsjax eval v2-lite --task perplexity --data book.txt notes/*.md",
    )
    _add_model(command)
    command.add_argument("--task", choices=("perplexity",), required=True)
    command.add_argument("--data", nargs="+", required=True, metavar="FILES")
    command.add_argument(
        "--length", type=_positive, help="tokens a window (default: 2048 at most)"
    )
    command.add_argument(
        "--stride",
        type=_positive,
        help="tokens from window to window (default: half of the length)",
    )
    command.add_argument("--batch", type=_positive, default=4, help="(default: 4)")
    command.add_argument("--json", action="store_true", help="print one JSON object")


# --- scaling


def _scaling(args: argparse.Namespace) -> None:
    """Learning rate, batch, model and data size for a budget of FLOPs.

    By the scaling laws of the DeepSeek LLM paper.
    """
    from dsjax.train.scaling import scaling

    found = scaling(args.flops)
    print(json.dumps(found.as_dict()) if args.json else found)


def _add_scaling(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, _scaling, example="dsjax scaling --flops 1e20")
    command.add_argument(
        "--flops", type=float, required=True, metavar="C", help="of training in all"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


if __name__ == "__main__":
    raise SystemExit(main())
