"""Commands that say what there is: what works on a machine, the methods, the forms of engines."""

import click

from coopq.cli.options import SectionedCommand, as_json
from coopq.cli.terminal import print_result, progress_bars, quiet_libraries
from coopq.core.errors import ModelError


@click.command(cls=SectionedCommand)
@click.argument("model", required=False)
@as_json
def doctor(model: str | None, as_json: bool) -> None:
    """Say what works on this machine: extras, engines, memory; and what a run of MODEL needs."""
    from coopq.report.doctor import doctor_report, examine

    quiet_libraries()
    with progress_bars() as progress:
        found = examine(model, progress)
    print_result(found, doctor_report(found), as_json)
    if (reason := found.get("model", {}).get("refused")) is not None:
        raise ModelError(reason)


@click.command(cls=SectionedCommand)
@as_json
def methods(as_json: bool) -> None:
    """List the methods: what each is for, and what it costs."""
    from coopq.report.data import methods_data
    from coopq.report.tables import methods_table

    print_result(methods_data(), methods_table(), as_json)


@click.command(cls=SectionedCommand)
@as_json
def targets(as_json: bool) -> None:
    """List the forms of engines: what each is for, and what it takes."""
    from coopq.report.data import targets_data
    from coopq.report.tables import targets_table

    print_result(targets_data(), targets_table(), as_json)
