"""The command line: arguments and exit codes; the work is done elsewhere, and imported when needed."""

from __future__ import annotations

import io
import os
import sys
from contextlib import nullcontext
from typing import Any

import click

from freezekit import __version__
from freezekit.errors import FreezekitError

__all__ = ["main"]


class _Group(click.Group):
    """Turns freezekit's own errors into one line on stderr and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a name may not fit the terminal's encoding
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except FreezekitError as error:
            click.echo(f"freezekit: {error}", err=True)
            ctx.exit(error.exit_code)


def _emit(report: str) -> None:
    """Write the report to stdout; its reader may stop early, which changes nothing about the verdict."""
    try:
        click.echo(report)
        sys.stdout.flush()
    except BrokenPipeError:
        # or Python would complain when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise FreezekitError(
            "cannot write the report", where="stdout", got=error.strerror, remedy="write it elsewhere"
        ) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="freezekit")
def main() -> None:
    """Make frozen mean frozen in PyTorch, and prove it.

    Exit codes: 0 clean, 1 drift or bad statistics, 2 wrong usage, 3 unreadable, unsupported or hostile file.
    """


def _print_schema(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the schema and leave, before CKPT is asked for."""
    if wanted:
        from freezekit.report.json import schema

        _emit(schema().rstrip())
        ctx.exit()


@main.command()
@click.argument("checkpoints", metavar="CKPT...", nargs=-1, required=True)
@click.option(
    "--against",
    metavar="BASE",
    help="The checkpoint that training started from, or published weights, from the local cache or fetched: "
    "torchvision:NAME[/WEIGHTS], timm:NAME. Without it, CKPT is judged alone.",
)
@click.option(
    "--frozen",
    metavar="GLOB",
    multiple=True,
    help="What must not have changed: a layer, a tensor or a glob; repeatable. Without it, what a manifest "
    "in CKPT says, or its optimizer never held; or else the layers whose own parameters did not change.",
)
@click.option(
    "--manifest",
    metavar="FILE",
    help="What was frozen, with digests: a manifest's file, or a checkpoint that holds one. Needs no BASE, "
    "which only adds how far things moved. One inside CKPT itself is found without it.",
)
@click.option(
    "--root",
    metavar="NAME",
    help="Which model to audit, in a file that holds several: ema, teacher. The report lists them.",
)
@click.option(
    "--no-limits",
    is_flag=True,
    help="Lift the caps on what a file may hold, for one from a source that you trust.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "markdown", "html"]),
    help="Of the report.  [default: as FILE ends, or table]",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Write the report to FILE, whole or not at all, and its verdict to stdout. The ending .txt, .json, "
    ".md or .html tells the format.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only; the exit code tells.")
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of --format json and exit.",
)
@click.pass_context
def audit(
    ctx: click.Context,
    checkpoints: tuple[str, ...],
    against: str | None,
    frozen: tuple[str, ...],
    manifest: str | None,
    root: str | None,
    no_limits: bool,
    form: str | None,
    output: str | None,
    quiet: bool,
) -> None:
    """Audit checkpoints: what moved though it was frozen, and what is wrong with the statistics.

    CKPT is a file of torch.save (whatever is in it), safetensors, TorchScript or torch.export, an index of
    shards, or the folder of one of Hugging Face's tools, torch.distributed.checkpoint or DeepSpeed. Several,
    or the folder of a run, are audited as a run: the report tells when drift began. A saved report is shown.

    Alone, the batch-norm layers of CKPT are listed and judged; with --against, what was frozen is compared
    bit for bit with BASE; with --manifest, with its digests. Needs no torch, and executes nothing in the
    files.

    \b
    Examples:
      freezekit audit model.pth
      freezekit audit finetuned.pth --against pretrained.pth
      freezekit audit finetuned.pth --against pretrained.pth --frozen 'features.*'
      freezekit audit finetuned.pth --against torchvision:resnet50
      freezekit audit run/*.ckpt --against pretrained.pth -o drift.html
      freezekit audit finetuned.pth --manifest frozen.json --quiet
      freezekit audit drift.json
    """  # noqa: D301  # click keeps lines as they are after a real backspace
    from freezekit.audit.files import audit_checkpoint
    from freezekit.report.output import check_output, form_of, render
    from freezekit.report.progress import progress_bar

    form = form_of(output, form)
    if output is not None:
        check_output(output, [*checkpoints, against, manifest])
    with nullcontext() if quiet else progress_bar():
        report = audit_checkpoint(
            checkpoints,
            against=against,
            frozen=frozen or None,
            manifest=manifest,
            root=root,
            no_limits=no_limits,
        )
    if output is not None:
        from freezekit.jsonfile import write
        from freezekit.report.summary import verdict

        write(output, f"{render(report, form).rstrip()}\n", "report")
        if not quiet:
            _emit(verdict(report).text)
    elif not quiet:
        _emit(render(report, form, terminal=True).rstrip())
    ctx.exit(0 if report.clean else 1)


@main.command()
@click.argument("model", metavar="MODEL")
def plan(model: str) -> None:
    """Show what freeze_backbone would freeze of a model.

    MODEL is torchvision:NAME, timm:NAME, or package.module:factory, a class or function that makes the
    model when called without arguments. It is built without memory, and no weights are loaded.

    \b
    Examples:
      freezekit plan torchvision:resnet50
      freezekit plan timm:vit_base_patch16_224
      freezekit plan mypackage.models:make_model
    """  # noqa: D301  # as above
    from freezekit.freezing.plan import plan as made

    _emit(made(model))


@main.command()
@click.argument("codes", metavar="[CODE]...", nargs=-1)
def explain(codes: tuple[str, ...]) -> None:
    """Explain the codes of findings.

    What each means, how people get there, what to do, and where it is written. Without CODE, all of
    them with a line each.

    \b
    Examples:
      freezekit explain
      freezekit explain FK301 FK305
    """  # noqa: D301  # as above
    import shutil

    from freezekit.audit.codes import known_codes
    from freezekit.report.explain import render, render_list

    width = min(max(shutil.get_terminal_size((80, 24)).columns, 40), 100)
    _emit(render(known_codes(codes), width=width) if codes else render_list(width=width))


@main.command()
@click.option("--keep", metavar="DIR", help="Keep the three checkpoints in this folder.")
def demo(keep: str | None) -> None:
    """Show the trap and the cure on real digits.

    Trains a small network with batch norm on scikit-learn's handwritten digits, then fine-tunes its head on
    shifted ones, the backbone frozen by requires_grad=False and by freezekit, and audits both: while they
    train and, from the saved checkpoints, on disk. Takes less than a minute and no network.
    """
    from freezekit.demo import run

    run(keep)


@main.command()
@click.argument("drifted", metavar="DRIFTED")
@click.option(
    "--from",
    "base",
    metavar="BASE",
    required=True,
    help="The checkpoint that training started from, as for audit.",
)
@click.option(
    "--frozen",
    metavar="GLOB",
    multiple=True,
    help="What to put back: a layer, a tensor or a glob; repeatable. Without it, what freezekit audit "
    "DRIFTED --against BASE takes for frozen.",
)
@click.option(
    "--manifest", metavar="FILE", help="What was frozen: a manifest's file, or a checkpoint that holds one."
)
@click.option(
    "--root", metavar="NAME", help="Which model to restore, in a file that holds several: ema, teacher."
)
@click.option(
    "-o",
    "--output",
    "out",
    metavar="OUT",
    required=True,
    help="The repaired copy, which must not be there yet.",
)
def restore(
    drifted: str, base: str, frozen: tuple[str, ...], manifest: str | None, root: str | None, out: str
) -> None:
    """Write a copy of a checkpoint with what was frozen put back.

    OUT is DRIFTED with the frozen tensors (running statistics, counters, and whatever else moved) as they are
    in BASE, bit for bit; all else in the file stays as it is: trained layers, optimizer, settings. DRIFTED is
    one file: .pt, .pth or .ckpt (zip or legacy) or .safetensors. OUT is written beside its place, read again,
    compared, and only then named; DRIFTED and BASE are never written to. Needs no torch, and executes nothing
    in the files.

    Exit codes: 0 written, 2 wrong usage or something frozen cannot be put back, 3 unreadable, unsupported or
    hostile file. Unless it is 0, nothing was written.

    \b
    Examples:
      freezekit restore finetuned.pth --from pretrained.pth -o repaired.pth
      freezekit restore finetuned.pth --from pretrained.pth --frozen 'features.*' -o repaired.pth
      freezekit restore last.ckpt --from pretrained.pth --manifest frozen.json -o repaired.ckpt
    """  # noqa: D301  # as above
    from freezekit.audit.restoring import restore_checkpoint

    _emit(str(restore_checkpoint(drifted, base, out, frozen=frozen or None, manifest=manifest, root=root)))
