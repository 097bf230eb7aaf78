"""The same scripts for a site where a person must submit by hand; what they copy back is collected as any other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from harness.backends import durable, files
from harness.backends.slurm import outcome as ends
from harness.backends.slurm import script, site
from harness.backends.slurm.backend import SCRIPT_FILE, Slurm
from harness.schema import Command, Job, Outcome, Ticket

README = """\
# {name}: jobs for a Slurm cluster, to be submitted by hand

1. Copy this folder to the cluster as it is:

       rsync -a {here}/ LOGIN-NODE:{there}/

   Every node must see {there}; another place needs another `runs:` in the site file, and the export made again.
2. On the login node queue what has not been started yet; each script says in its head what it asks for:

       sh {there}/submit.sh

3. When `squeue --me` is empty, copy everything back:

       rsync -a LOGIN-NODE:{there}/ {here}/

4. Give the `harness run` command of the export again: it makes a record of each job that has ended, the report from
   the records, and the scripts of whatever comes next (the serving half of a chain).
"""
SUBMIT = """\
#!/bin/sh
# Queues each job of this folder that no script has started yet.
cd "$(dirname "$0")/jobs" || exit 1
for job in */job.sbatch; do
  folder=${job%/job.sbatch}
  [ -e "$folder/started.txt" ] || [ -e "$folder/queued.txt" ] || [ -e "$folder/outcome.json" ] ||
    (cd "$folder" && sbatch --parsable job.sbatch >queued.txt || rm -f queued.txt)
done
"""


def open_backend(argument: str) -> Export:
    """The writer of scripts for the site of that name or path; HarnessError where its file is wrong."""
    return Export(site.load(argument), str(site.path_of(argument)))


class Export(Slurm):
    """Writes scripts and starts nothing; a run ends when it has written them, and goes on once results are back."""

    name = "export"
    by_hand = True

    def __init__(self, place: site.Site, argument: str) -> None:
        super().__init__(place, argument)
        self.at_once: int = 1_000_000
        self.pause_s = 0.0

    def submit(self, job: Job, command: Command, job_dir: Path) -> Ticket:
        """Lay the job's files and its script, made for the place that its run directory has on the cluster."""
        files.refuse_used(job_dir)
        folder = job_dir.resolve()
        here, there = folder.parent.parent, self._there(folder.parent.parent)
        try:
            files.lay(job, folder)
            order = self.order(job, _moved(command, here, there), there / "jobs" / folder.name, folder.name)
            durable.write_atomically(str(folder / SCRIPT_FILE), script.text(order), mode=0o700)
            words = {"name": here.name, "here": str(here), "there": str(there)}
            durable.write_atomically(str(here / "README.md"), README.format(**words))
            durable.write_atomically(str(here / "submit.sh"), SUBMIT, mode=0o755)
            return self._ticket(job.id, folder, folder.name, "")
        except OSError as error:
            raise files.cannot_start(job_dir, error) from error

    def _there(self, run_dir: Path) -> Path:
        return Path(self.site.runs) / run_dir.name

    def poll(self, tickets: Sequence[Ticket]) -> set[str]:
        """Ids of the jobs whose results are back."""
        return {ticket.job_id for ticket in tickets if self._back(ticket)}

    def _back(self, ticket: Ticket) -> bool:
        folder = Path(ticket.job_dir)
        return files.outcome_path(ticket).exists() or ends.ended(folder) is not None

    def collect(self, ticket: Ticket) -> Outcome:
        """What the script itself said of the job's end."""
        if (found := files.read_outcome(ticket)) is None:
            folder = Path(ticket.job_dir)
            begun = ends.started(folder)
            handle = ticket.handle | {"job": begun.job if begun else ""}
            ends.name_rank_logs(folder)
            hosts = tuple(path.name.removeprefix("node.").removesuffix(".txt") for path in folder.glob("node.*.txt"))
            found = ends.judge(ticket.model_copy(update={"handle": handle}), None, tuple(sorted(hosts)), ())
            durable.write_atomically(str(files.outcome_path(ticket)), found.model_dump_json(indent=1) + "\n")
        return found

    def cancel(self, ticket: Ticket) -> None:
        """Nothing: only a person on the cluster can end what a person queued there."""

    def adopt(self, run_dir: Path) -> list[str]:
        """Say what is still to come back."""
        waiting = [path for path in sorted(run_dir.glob("jobs/*/job.sbatch")) if not _settled(path.parent)]
        return [f"{len(waiting)} exported jobs have no result yet: see {run_dir / 'README.md'}"] if waiting else []

    def reap(self, run_dir: Path) -> list[str]:
        """Forget the exported jobs that have no result; those that are queued on the cluster stay there."""
        lines = []
        for path in sorted(run_dir.glob("jobs/*/ticket.json")):
            if not _settled(path.parent):
                ticket = Ticket.model_validate_json(path.read_bytes())
                now = time.time()
                given_up = Outcome(
                    interrupted=True, start=ticket.submitted_at, end=now, detail="the export was cancelled"
                )
                durable.write_atomically(str(path.parent / "outcome.json"), given_up.model_dump_json(indent=1) + "\n")
                lines.append(f"{path.parent.name} is not waited for; where it is queued, end it there with scancel")
        return lines


def _settled(folder: Path) -> bool:
    return (folder / "outcome.json").exists() or ends.ended(folder) is not None


def _moved(command: Command, here: Path, there: Path) -> Command:
    """The command with this machine's run directory replaced by the cluster's."""
    text = command.model_dump_json().replace(str(here), str(there))
    return Command.model_validate_json(text)
