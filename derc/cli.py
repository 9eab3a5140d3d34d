"""The command line; every command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from derc import __version__
from derc.cli_finetune import finetune
from derc.cli_targets import targets

if TYPE_CHECKING:
    from derc.config import CompileSettings
    from derc.console import Console

Function = Callable[..., Any]

EPILOG = (
    "Exit codes: 0 done, 1 bug, 2 usage, 3 infeasible, 4 parity, 5 missing dependency or device, "
    "6 measurement unstable, 7 built but over budget, 8 integrity, 9 engine build failed, 130 interrupted."
)

SOURCES: tuple[Function, ...] = (
    click.option("--zoo", help="digits, timm:NAME[,NAME…] or another library's, or a TOML file."),
    click.option("--checkpoint", type=click.Path(), help="Weights for --zoo timm:NAME."),
    click.option("--offline", is_flag=True, default=None, help="Published weights from the local hub caches alone."),
    click.option("--input-size", help="Size that all donors are brought to: 224, HxW or CxHxW."),
    click.option("--data", help="digits, folder:PATH, npz:PATH or hf:PATH."),
    click.option("--probe", type=int, help="Number of probe images."),
    click.option("--seed", type=int, help="Seed of every random choice."),
)
PARTITION: tuple[Function, ...] = (
    click.option("--blocks", help="Blocks per donor, K, or auto.  [default: 4]"),
    click.option("--epsilon", type=float, help="Slack of a block's size over 1/K.  [default: 0.2]"),
    click.option("--similarity", help="How alike two values are: cka, cka-debiased, rbf or r2.  [default: cka]"),
    click.option("--pool", is_flag=True, default=None, help="Take means over all positions before that."),
    click.option("--sets", help="Sum the likeness of all pairs of a set's blocks, or to centres.  [default: pairs]"),
    click.option("--exact", is_flag=True, default=None, help="Prove how good the partition is; for small zoos."),
)
DEVICE: tuple[Function, ...] = (
    click.option("--target", help="Device to compile for.  [default: cpu]"),
    click.option("--threads", type=int, help="Threads of the engine; 0: physical cores."),
    click.option("--batch", type=int, help="Static batch size.  [default: 1]"),
    click.option("--profile-s", type=float, help="Seconds that measuring may take.  [default: as needed]"),
)
PRECISION: tuple[Function, ...] = (
    click.option("--engine", help="Engines to choose from, such as onnxruntime,openvino.  [default: the target's]"),
    click.option("--precision", help="What a block may be computed in: fp32,fp16,bf16,int8.  [default: fp32]"),
)
LATENCY = click.option("--latency-ms", help="Latency budget in ms; several, 2,5,10, give a bundle each: OUTPUT/2ms …")
SIZES: tuple[Function, ...] = (
    click.option("--params-m", type=float, help="Parameter budget in millions."),
    click.option("--macs-g", type=float, help="Budget of multiply-accumulates in billions."),
    click.option("--memory-mb", type=float, help="Peak memory budget: weights and largest activation, in MB."),
    click.option("--min-latency-ms", type=float, help="Latency at the least, in ms."),
    click.option("--min-params-m", type=float, help="Parameters at the least, in millions."),
    click.option("--min-macs-g", type=float, help="Multiply-accumulates at the least, in billions."),
)
SEARCH: tuple[Function, ...] = (
    click.option(
        "--solver", type=click.Choice(["auto", "derc", "highs", "gurobi"]), help="What selects; derc: its own search."
    ),
    click.option("--interval", is_flag=True, default=None, help="Blocks between any cuts, not the partition's alone."),
    click.option("--max-blocks", type=int, help="Pieces of an assembly at most; a donor's next block is no new one."),
    click.option("--top", type=int, help="Solutions asked of the solver per round."),
    click.option("--evaluations", type=int, help="Assemblies stitched and scored at most."),
    click.option("--objective", help="Proxy that ranks assemblies: accuracy, kl, linear_probe, …  [default: accuracy]"),
    click.option(
        "--head", type=click.Choice(["auto", "fit", "donor"]), help="Fit heads to the labels; auto: if no donor's fits."
    ),
)
MATCH: tuple[Function, ...] = (
    click.option("--match", help="Train stitches without labels: images shown (3000) or seconds (30s); 0: not."),
    click.option("--match-teacher", help="Whose answers they learn: tail, best or a donor's name.  [default: tail]"),
)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


def options(*groups: tuple[Function, ...]) -> Callable[[Function], Function]:
    """Add groups of options to a command, in order."""

    def add(command: Function) -> Function:
        for group in reversed(groups):
            for option in reversed(group):
                command = option(command)
        return command

    return add


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="derc")
def cli() -> None:
    """Deep Reassembly Compiler: the best network that a zoo's blocks make within a latency budget."""


@cli.command("compile")
@options(SOURCES, DEVICE, PRECISION, (LATENCY, *SIZES), PARTITION, SEARCH, MATCH)
@click.option("--emit", help="triton: add a model repository for Triton Inference Server to the bundle.")
@click.option("-o", "--output", type=click.Path(), help="Directory of the bundle.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@JSON
def compile_(as_json: bool, quiet: bool, **flags: Any) -> None:
    """Compile a zoo to a bundle; what is not given comes from the environment (DERC_…), then from derc.toml."""
    every, console = _budgets(flags, quiet)
    from derc.compiler import compile_bundle
    from derc.summary import command_line, result

    if len(every) > 1:
        from derc.budgets import compile_budgets

        _print(compile_budgets(every, console), as_json)
        return
    manifest = compile_bundle(every[0], console, command_line(every[0]))
    if as_json:
        click.echo(json.dumps(result(manifest)))
    else:
        _tell(manifest)


@cli.command()
@options(SOURCES, DEVICE, PRECISION, SIZES, PARTITION, SEARCH, MATCH)
@click.option("--points", type=int, default=12, show_default=True, help="Latency budgets that are swept.")
@click.option("-o", "--output", type=click.Path(), help="Directory of pareto.json, pareto.txt and pareto.svg.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@JSON
def pareto(points: int, as_json: bool, quiet: bool, **flags: Any) -> None:
    """The best network for every latency: sweep the budget and write the front as table, JSON and plot."""
    settings, console = _settings(flags, quiet)
    from derc.pareto import write_front

    _print(write_front(settings, points, settings.output, console), as_json)


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@options(SOURCES, DEVICE, MATCH)
@click.option("-o", "--output", type=click.Path(), help="Directory of the bundle.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@JSON
def assemble(recipe: Path, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Build the network that RECIPE, a TOML file, writes down; with --data its linear stitches are fitted."""
    from derc.recipe import read_recipe

    flags["zoo"] = flags["zoo"] or read_recipe(recipe).zoo
    settings, console = _settings(flags, quiet)
    from derc.assembling import assemble_bundle
    from derc.recipe_bundle import result

    manifest = assemble_bundle(recipe, settings, console)
    if as_json:
        click.echo(json.dumps(result(manifest)))
    else:
        _tell(manifest)


@cli.command()
@click.option("--force", is_flag=True, help="Replace an existing derc.toml.")
def init(force: bool) -> None:
    """Write a commented derc.toml into the working directory."""
    from derc.config import TEMPLATE
    from derc.errors import UsageError

    path = Path("derc.toml")
    if path.exists() and not force:
        raise UsageError("derc.toml exists already: edit it, or replace it with --force")
    path.write_text(TEMPLATE, encoding="utf-8")
    click.echo("wrote derc.toml")


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--limit-s", type=float, default=20.0, show_default=True, help="Longest time to measure.")
@JSON
def build(bundle: Path, limit_s: float, as_json: bool) -> None:
    """Build a bundle's engine on the device that it is for, measure it and complete the bundle."""
    from derc.completing import build_bundle

    manifest = build_bundle(bundle, limit_s, _console())
    if as_json:
        click.echo(json.dumps({name: manifest[name] for name in ("status", "target", "budget", "latency", "parity")}))
    else:
        _tell(manifest)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@JSON
def verify(bundle: Path, as_json: bool) -> None:
    """Check every file of a bundle against its digest."""
    from derc.bundle import verify as check

    manifest = check(bundle)
    if as_json:
        click.echo(json.dumps({"status": "ok", "files": manifest["files"]}))
    else:
        click.echo(f"{bundle}: {len(manifest['files'])} files are what derc wrote")


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--limit-s", type=float, default=60.0, show_default=True, help="Longest time to measure.")
@JSON
def bench(bundle: Path, limit_s: float, as_json: bool) -> None:
    """Measure a bundle's engine against eager PyTorch and the donors, interleaved."""
    from derc.bench import bench_bundle, table

    result = bench_bundle(bundle, limit_s, _console())
    click.echo(json.dumps(result) if as_json else table(result))


@cli.group()
def zoo() -> None:
    """Look at a zoo."""


@zoo.command("show")
@options(SOURCES)
@JSON
def zoo_show(as_json: bool, **flags: Any) -> None:
    """Each donor's cuts, units, shapes, parameters and MACs."""
    from derc.inspection import show_zoo

    _print(show_zoo(*_settings(flags)), as_json)


@cli.command()
@options(SOURCES, PARTITION)
@JSON
def partition(as_json: bool, **flags: Any) -> None:
    """Cut the donors into blocks and show the equivalence sets."""
    from derc.inspection import show_partition

    _print(show_partition(*_settings(flags)), as_json)


@cli.command()
@options(SOURCES, DEVICE, PRECISION, PARTITION)
@click.option("-o", "--output", "table", type=click.Path(path_type=Path), help="Write the latency table as JSON.")
@JSON
def profile(as_json: bool, table: Path | None, **flags: Any) -> None:
    """Measure donors, blocks and stitches on the target."""
    from derc.inspection import show_profile

    _print(show_profile(*_settings(flags), table), as_json)


@cli.command()
@JSON
def doctor(as_json: bool) -> None:
    """What of derc works on this machine, and what is missing."""
    from dataclasses import asdict

    from derc.doctor import diagnose, healthy, render

    findings = diagnose()
    click.echo(json.dumps([asdict(f) for f in findings]) if as_json else render(findings))
    if not healthy(findings):
        sys.exit(5)


@cli.group()
def cache() -> None:
    """The store of earlier results."""


@cache.command("ls")
@JSON
def cache_ls(as_json: bool) -> None:
    """List what the store keeps."""
    from derc.inspection import list_store

    _print(list_store(_store()), as_json)


@cache.command("verify")
@JSON
def cache_verify(as_json: bool) -> None:
    """Check every entry against its digests."""
    from derc.errors import IntegrityError

    store = _store()
    damaged = store.verify()
    if damaged:
        listed = "; ".join(f"{key[:12]}: {why}" for key, why in damaged)
        raise IntegrityError(f"{len(damaged)} entries of the store are damaged ({listed}): derc cache gc removes them")
    total = len(store.entries())
    click.echo(json.dumps({"status": "ok", "entries": total}) if as_json else f"all {total} entries are intact")


@cache.command("gc")
@click.option("--older-than-days", type=float, help="Remove entries older than this.")
@click.option("--max-mb", type=float, help="Remove the oldest until the store is no larger.")
@click.option("--all", "everything", is_flag=True, help="Remove every entry.")
def cache_gc(older_than_days: float | None, max_mb: float | None, everything: bool) -> None:
    """Remove damaged entries and leftovers, and what is over the limits given."""
    limit = None if max_mb is None else int(max_mb * 1e6)
    count, freed = _store().gc(max_bytes=limit, older_than_days=older_than_days, everything=everything)
    click.echo(f"removed {count} entries, {freed / 1e6:.1f} MB")


cli.add_command(finetune)
cli.add_command(targets)


def _store() -> Any:
    from derc.store import Store

    return Store.default(say=_console().say)


def _console(quiet: bool = False) -> Console:
    from derc.console import Console

    console = Console(quiet)
    console.listen()
    return console


def _settings(flags: dict[str, Any], quiet: bool = False) -> tuple[CompileSettings, Console]:
    from derc.config import resolve

    return _told(resolve(flags, os.environ, Path.cwd()), _console(quiet))


def _budgets(flags: dict[str, Any], quiet: bool) -> tuple[tuple[CompileSettings, ...], Console]:
    """The settings for each latency budget that was given."""
    from derc.config import resolve_all

    every = resolve_all(flags, os.environ, Path.cwd())
    return every, _told(every[0], _console(quiet))[1]


def _told(settings: CompileSettings, console: Console) -> tuple[CompileSettings, Console]:
    if settings.embedded_zoo:
        console.say("no zoo was named: compiling the embedded zoo of handwritten digits (derc init writes a derc.toml)")
    return settings, console


def _print(found: tuple[dict[str, Any], str], as_json: bool) -> None:
    click.echo(json.dumps(found[0]) if as_json else found[1])


def _tell(manifest: dict[str, Any]) -> None:
    from derc.summary import told

    click.echo("\n".join(told(manifest)))


def main() -> None:
    """Run the command line; every error derc knows of is one sentence on stderr and its exit code."""
    from derc.errors import DercError

    ended = list[int]()
    atexit.register(_end, ended)
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        ended.append(130)
        _fail("interrupted; run the same command again to go on from what is stored", 130)
    except DercError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:  # the last line of defence: a bug
        if os.environ.get("DERC_DEBUG"):
            raise
        _fail(f"this is a bug in derc ({type(error).__name__}: {error}); DERC_DEBUG=1 shows where", 1)


def _end(codes: list[int]) -> None:
    """Leave with the exit code of an interrupt, as the last thing at exit.

    Python ends by the signal itself once an interrupt has left code that was executed from text, as dataclasses are
    made, although it was caught since (`unhandled_keyboard_interrupt` in CPython).
    """
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


def _fail(message: str, code: int) -> None:
    print(f"derc: {message}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps({"status": "error", "exit_code": code, "error": message}))
    sys.exit(code)
