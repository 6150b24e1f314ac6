"""The command `aufast`: the first run on a photograph, labelling, data sets, training and evaluation."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import aufast

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again; a scheduler may requeue on it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the command's name; None for those of the process.

    Returns:
        The exit status: 0; 1 where the input could not be used, with one sentence on stderr; 75 where SIGTERM
        stopped a training that goes on when it is resumed.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (OSError, TypeError, ValueError, ImportError) as error:
        print(f"aufast: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aufast", description="Facial action units, fast.")
    parser.add_argument("--version", action="version", version=f"aufast {aufast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="run both models on a photograph and draw what they see")
    demo.add_argument(
        "images", nargs="*", metavar="IMAGE", help="photographs; without one, scikit-image's astronaut"
    )
    demo.add_argument(
        "--weights", metavar="DIR", help="a folder saved by save_pretrained, or one holding `margl` and `aar`"
    )
    demo.add_argument(
        "--out", metavar="DIR", default="demo", help="where the pictures go (default: %(default)s)"
    )
    demo.add_argument(
        "--train",
        action="store_true",
        help="draw SYNTHETIC faces, train a small MARGL and a small AAR on them and test both, in minutes",
    )
    demo.set_defaults(run=_demo)

    state = commands.add_parser(
        "backends", help="say who can compute the operators here, and why others cannot"
    )
    state.set_defaults(run=_backends)

    _add_label_command(commands)

    plot = commands.add_parser("plot", help="draw the papers' figures for the largest face of images")
    plot.add_argument("images", nargs="+", metavar="IMAGE")
    plot.add_argument("--model", metavar="DIR", required=True, help="a folder saved by save_pretrained")
    plot.add_argument("--out", metavar="DIR", required=True, help="where the pictures go")
    plot.set_defaults(run=_plot)

    data = commands.add_parser("data", help="check, prepare or synthesize a data set")
    _add_data_commands(data.add_subparsers(required=True, metavar="COMMAND"))
    _add_training_commands(commands)
    return parser


def _add_label_command(commands: argparse._SubParsersAction) -> None:
    label = commands.add_parser(
        "label",
        help="label images and videos with a model; a stopped run goes on",
        epilog="Exit status: 0 if every input was labelled whole, 3 if some were not, 1 if the run could not "
        "go on.",
    )
    label.add_argument("paths", nargs="*", metavar="PATH", help="images, videos, and folders of them")
    label.add_argument("--manifest", metavar="FILE", help="a text file with a path on each line")
    label.add_argument("--model", metavar="DIR", required=True, help="a folder saved by save_pretrained")
    label.add_argument("--out", metavar="DIR", required=True, help="where tables and sidecars go")
    label.add_argument("--shard", metavar="I/N", default="0/1", help="label the I-th of N parts, from 0")
    label.add_argument(
        "--format",
        dest="formats",
        action="append",
        choices=("openface", "pyfeat", "elan", "parquet"),
        help="of the table, more than once for several (default: openface)",
    )
    label.add_argument(
        "--overlay", action="store_true", help="also write pictures or videos with what is seen"
    )
    label.add_argument("--report", action="store_true", help="also write one HTML page for each input")
    label.add_argument(
        "--pseudo-intensity", action="store_true", help="also AUnn_r, five times the probability"
    )
    label.add_argument("--faces", metavar="DIR", help="STEM.csv files with boxes or landmarks of the inputs")
    label.add_argument("--one-based", action="store_true", help="coordinates in them count from 1")
    label.add_argument("--landmarks", metavar="FILE", help="dlib's 68-point model")
    label.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto")
    label.add_argument("--dtype", choices=("float32", "bfloat16"), help="of feature maps (default: float32)")
    for name, kind, what in (
        ("threshold", float, "an AU is present from this probability on (default: 0.5)"),
        ("detect-every", int, "detect in every K-th frame, follow faces between (default: 1)"),
        ("upsample", int, "double the image this often to find smaller faces (default: 0)"),
        ("face-threshold", float, "lowest score that counts as a face (default: 0.2)"),
        ("min-duration", float, "shortest ELAN segment in seconds (default: 0)"),
        ("max-gap", float, "longest pause that an ELAN segment bridges, in seconds (default: 0)"),
        ("batch", int, "faces a call of the model (default: 16)"),
        ("workers", int, "detection threads (default: 2)"),
        ("timeout", float, "seconds an input may take (default: no limit)"),
        ("stall", float, "seconds that decoding one frame may take (default: 300)"),
        ("memory", int, "bytes that decoding may take (default: 4 GiB)"),
        ("max-pixels", int, "larger frames are refused (default: 80 million)"),
    ):
        label.add_argument(f"--{name}", type=kind, metavar="X" if kind is float else "N", help=what)
    label.set_defaults(run=_label)


def _add_data_commands(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser("check", help="say what a data set's folder holds and what is missing")
    prepare = commands.add_parser("prepare", help="align and pack a data set's faces; a stopped run goes on")
    for command in (check, prepare):
        command.add_argument(
            "root", metavar="ROOT", help="the data set's folder, or the JSON file of a table"
        )
        command.add_argument(
            "--dataset", choices=("bp4d", "disfa", "affwild2", "table"), help="default: look"
        )
        command.add_argument("--aus", type=int, nargs="+", metavar="AU", help="default: the papers'")
        command.add_argument("--camera", choices=("left", "right"), help="DISFA's, where both are there")
        command.add_argument(
            "--first-image",
            dest="first_image",
            type=int,
            choices=(0, 1),
            help="number of the image of DISFA's first frame; default: look",
        )
        command.add_argument(
            "--bad-landmarks",
            dest="bad_landmarks",
            choices=("drop", "keep"),
            help="frames of DISFA whose released landmarks are wrong (default: drop)",
        )
    prepare.add_argument("out", metavar="OUT", help="the packed folder")
    prepare.add_argument("--landmarks", choices=("auto", "files", "dlib"), default="auto")
    prepare.add_argument(
        "--size", type=int, default=200, help="side of an aligned face (default: %(default)s)"
    )
    check.set_defaults(run=_data_check)
    prepare.set_defaults(run=_data_prepare)

    make = commands.add_parser("synthesize", help="draw SYNTHETIC faces in a data set's own layout")
    make.add_argument("root", metavar="ROOT", help="a folder that does not exist yet, or is empty")
    make.add_argument("--layout", choices=("bp4d", "disfa"), default="bp4d")
    for name in ("subjects", "videos", "frames", "size", "seed"):
        make.add_argument(f"--{name}", type=int)
    make.add_argument("--no-occluders", dest="occluders", action="store_false")
    make.set_defaults(run=_data_synthesize)
    for command in (prepare, make):
        command.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")


def _add_training_commands(commands: argparse._SubParsersAction) -> None:
    for name, run, what in (
        ("train", _train, "train a model on packed data, also under torchrun"),
        ("ablation", _ablation, "train every variant of a model and print the paper's table"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("system", choices=("margl", "aar"))
        command.add_argument("options", nargs=argparse.REMAINDER, help=f"see `aufast {name} SYSTEM --help`")
        command.set_defaults(run=run)

    evaluate = commands.add_parser("evaluate", help="test finished runs and print the papers' tables beside")
    evaluate.add_argument("runs", nargs="+", metavar="RUN", help="folders of `aufast train`, one a part")
    evaluate.add_argument("--out", metavar="DIR", help="where the table goes; default: the run, if it is one")
    evaluate.add_argument("--checkpoint", dest="link", choices=("best", "last"), default="best")
    evaluate.add_argument("--data", metavar="DIR", default="", help="the packed data, where they have moved")
    evaluate.add_argument("--device", default="auto")
    evaluate.add_argument("--loaders", type=int, default=0, help="processes that load (default: 0)")
    evaluate.set_defaults(run=_evaluate)


def _demo(options: argparse.Namespace) -> int:
    if options.train:
        from aufast.train.short_run import short_run

        return 0 if short_run(options.out) else STOPPED
    from aufast.demo import run_demo

    return run_demo(options.images, weights=options.weights, out=options.out)


def _backends(options: argparse.Namespace) -> int:
    import torch
    from torch import zeros

    for name, state in aufast.backends().items():
        print(f"{name:<10} {state}")
    calls = {
        "roi_crop": (zeros(1, 8, 12, 12), zeros(1, 2, 4)),
        "graph_conv": (zeros(1, 12, 8), zeros(12, 4), zeros(12, 4), zeros(4, 8, 8)),
        "graph_gru": (zeros(1, 2, 12, 8), zeros(12, 4), zeros(12, 4), *zeros(3, 4, 16, 8)),
        "region_conv": (zeros(1, 8, 16, 16), zeros(2, 2, 8, 8, 3, 3)),
    }
    print("\nchosen where nobody asks:")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for name, tensors in calls.items():
            print(f"  {aufast.explain(getattr(aufast.ops, name), *(t.to(device) for t in tensors))}")
    return 0


def _label(options: argparse.Namespace) -> int:
    from aufast.label import FINE, LabelConfig, label_files

    index, slash, count = options.shard.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard must be I/N, such as 0/4, got {options.shard!r}")
    paths = list(options.paths)
    if options.manifest is not None:
        with open(options.manifest, encoding="utf-8", errors="surrogateescape") as file:
            paths += [line.rstrip("\r\n") for line in file if line.strip()]
    given = {
        field.name: value
        for field in dataclasses.fields(LabelConfig)
        if (value := getattr(options, field.name)) is not None
    }
    if options.formats:
        given["formats"] = tuple(options.formats)
    summary = label_files(paths, options.out, LabelConfig(**given), (int(index), int(count)))
    print(summary.text())
    return 0 if all(status in FINE for status in summary.inputs) else 3


def _plot(options: argparse.Namespace) -> int:
    from aufast.faces import FaceDetector, align_face, load_image
    from aufast.models import load_model
    from aufast.plot import paper_figures

    stems = collections.Counter(Path(path).stem for path in options.images)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise ValueError(f"images of one name would overwrite each other's figures: {', '.join(twice)}")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    model, detector = load_model(options.model).float(), FaceDetector()
    for path in options.images:
        image = load_image(path)
        face = align_face(image, detector.detect_one(image, path).landmarks)
        for kind, figure in paper_figures(model, face).items():
            figure.savefig(out / f"{Path(path).stem}-{kind}.png")
            print(out / f"{Path(path).stem}-{kind}.png")
    return 0


def _reader_options(options: argparse.Namespace) -> dict[str, object]:
    """What the command line says to the data set's reader."""
    names = ("aus", "camera", "first_image", "bad_landmarks")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _data_check(options: argparse.Namespace) -> int:
    from aufast.data import check_dataset

    report = check_dataset(options.root, options.dataset, **_reader_options(options))
    print(report.text())
    return 1 if report.problems else 0


def _data_prepare(options: argparse.Namespace) -> int:
    from aufast.data import prepare_dataset

    summary = prepare_dataset(
        options.root,
        options.out,
        dataset=options.dataset,
        landmarks=options.landmarks,
        size=options.size,
        workers=options.workers,
        **_reader_options(options),
    )
    print(summary.text())
    return 0


def _data_synthesize(options: argparse.Namespace) -> int:
    from aufast.data import Recipe, synthesize

    names = ("layout", "subjects", "videos", "frames", "size", "seed", "occluders")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    print(f"SYNTHETIC faces are in {synthesize(options.root, Recipe(**given), options.workers)}")
    return 0


def _run_options(command: str, system: str) -> argparse.ArgumentParser:
    """What `train` and `ablation` take besides the settings of the run."""
    parser = argparse.ArgumentParser(
        prog=f"aufast {command} {system}", add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--config", metavar="RECIPE|FILE", default="")
    parser.add_argument("--out", metavar="DIR", default="")
    return parser


def _train(options: argparse.Namespace) -> int:
    from aufast.train.loop import train
    from aufast.train.options import parse_run

    also = _run_options("train", options.system)
    also.add_argument("--resume", action="store_true", help="go on with the run in --out")
    config, others = parse_run(options.system, options.options, also)
    if not train(config, others.out, resume=others.resume):
        print(f"stopped; the same command with --resume goes on with {others.out}", file=sys.stderr)
        return STOPPED
    return 0


def _ablation(options: argparse.Namespace) -> int:
    from aufast.train.ablation import ablate
    from aufast.train.options import parse_run

    also = _run_options("ablation", options.system)
    also.add_argument("--variants", nargs="+", default=(), help="default: all of the system")
    also.add_argument(
        "--parts", nargs="+", type=int, default=(), help="default: 1 2 3; 1 for data with their own split"
    )
    also.add_argument("--seeds", nargs="+", type=int, default=(0,), help="default: 0")
    config, others = parse_run(options.system, options.options, also)
    text = ablate(config, others.out, variants=others.variants, parts=others.parts, seeds=others.seeds)
    if text is None:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from aufast.train.report import evaluate_runs

    if options.out is None and len(options.runs) > 1:
        raise ValueError("--out: name a folder for the table of several runs")
    evaluation = evaluate_runs(
        options.runs, link=options.link, root=options.data, device=options.device, loaders=options.loaders
    )
    if int(os.environ.get("RANK", 0)) == 0:
        try:  # neither a full disk nor a pipe that was closed costs the other one
            print(evaluation.text(), flush=True)
        finally:
            evaluation.save(options.out or options.runs[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
