"""Jobs: runs of the scripts, one after the other or side by side, that need one another and continue where they were stopped."""

import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from plumbing.files import find_checkpoints, prepare_output_dir, save_json, versions
from plumbing.log import duration
from plumbing.script import UserError, counted
from plumbing.signals import STOP_SIGNALS, signals_restored

ROOT = Path(__file__).parent.parent  # where the scripts lie


@dataclass(frozen=True)
class Job:
    """One run of a script. Its name says all that makes it different from other jobs of the budget."""

    name: str
    script: str
    directory: Path
    argv: tuple[str, ...]
    output: str  # the file that it is run for
    needs: tuple["Job", ...] = ()
    work: float = 0.0  # images, forward and back, in units of the script's usual cost
    keep: bool = False  # its checkpoints, which others look at

    @property
    def file(self) -> Path:
        """Where the output is."""
        return self.directory / self.output

    @property
    def record(self) -> dict:
        """What is known of the run: flags, seconds, commit, hardware, versions; empty before it is started."""
        path = self.directory / "job.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def stale(self) -> bool:
        """Whether it, or what it needs, was run with other flags, as after a change of `BUDGETS`."""
        return bool(self.record) and (self.record["argv"] != list(self.argv) or any(need.stale for need in self.needs))

    @property
    def finished(self) -> bool:
        """Whether it has run to its end, with these flags."""
        return self.record.get("finished", False) and not self.stale and self.file.exists()

    def with_needs(self) -> Iterator["Job"]:
        """The job after everything that it needs."""
        for need in self.needs:
            yield from need.with_needs()
        yield self

    @property
    def command(self) -> str:
        """What to type to run it, and what it needs."""
        return " && ".join(f"python {job.script}.py {shlex.join(job.argv)}" for job in unique([self]))


def unique(jobs: Iterable[Job]) -> list[Job]:
    """Every job once, after those that it needs."""
    return list(dict.fromkeys(part for job in jobs for part in job.with_needs()))


def circumstances(threads: int) -> dict:
    """What a number depends on besides its command."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    git = subprocess.run(describe, capture_output=True, text=True)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} of {os.cpu_count()} cores of {cpu}"
    return {"commit": git.stdout.strip() or "unknown", "hardware": device, "versions": versions()}


class Running:
    """A job under way in a process of its own, on so many threads; what it prints goes to output.txt. Keeps job.json."""

    def __init__(self, job: Job, threads: int):
        self.job, self.start, self.before = job, time.perf_counter(), job.record.get("seconds", 0.0)
        prepare_output_dir(str(job.directory))
        self.record = dict(script=job.script, argv=list(job.argv)) | circumstances(threads)
        self._note(False)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [sys.executable, str(ROOT / f"{job.script}.py"), *job.argv]
        with open(job.directory / "output.txt", "a") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def _note(self, finished: bool) -> None:
        seconds = round(self.before + time.perf_counter() - self.start, 1)
        save_json(self.job.directory / "job.json", self.record | dict(seconds=seconds, finished=finished))

    def end(self) -> bool:
        """Wait for the end, and note it; whether the job finished. What serves only for resuming then goes, unless others look at it."""
        finished = self.process.wait() == 0
        self._note(finished)
        for path in find_checkpoints(self.job.directory) if finished and not self.job.keep else ():
            path.unlink()
        return finished


def run_all(jobs: list[Job], side_by_side: int, result: Callable[[Job], str] = lambda job: "") -> None:
    """Run what has not finished, `side_by_side` at a time; UserError at the end if some failed. `result`: what to say of a finished job.

    A signal that asks a run to end ends all: the running jobs save what they have, and continue when the same are run again.
    """
    if stale := [job for job in jobs if job.stale]:
        differing = shlex.join(sorted(set(stale[0].record["argv"]) ^ set(stale[0].argv)))
        raise UserError(
            f"{counted(len(stale), 'job')}, {stale[0].directory} for one, ran with other flags ({differing} differ); delete them, or "
            f"choose another --output_dir"
        )
    waiting = [job for job in jobs if not job.finished]
    done, failed, started = len(jobs) - len(waiting), [], []
    threads = max(1, torch.get_num_threads() // side_by_side)
    with signals_restored():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler)
        try:
            while waiting or started:
                for job in [job for job in waiting if any(need in failed for need in job.needs)]:
                    waiting.remove(job)
                    failed.append(job)
                    print(f"{job.name} failed: a job that it needs has failed", flush=True)
                ready = [job for job in waiting if all(need.finished for need in job.needs)]
                for job in ready[: side_by_side - len(started)]:
                    waiting.remove(job)
                    started.append(Running(job, threads))
                time.sleep(0.2)
                for running in [running for running in started if running.process.poll() is not None]:
                    started.remove(running)
                    job = running.job
                    if running.end():
                        done += 1
                        print(f"[{done}/{len(jobs)}] {job.name}: {result(job)}{duration(job.record['seconds'])}", flush=True)
                    else:
                        failed.append(job)
                        print(f"{job.name} failed: see {job.directory / 'output.txt'}", flush=True)
        finally:
            for running in started:
                running.process.terminate()
            for running in started:
                running.end()
    if failed:
        names = ", ".join(job.name for job in failed)
        raise UserError(
            f"{counted(len(failed), 'job')} failed ({names}); the others are done, and the same command tries these again"
        )


def seconds_of(jobs: list[Job], speed: dict[str, float]) -> dict[Job, float]:
    """What the jobs took or will take: as measured, or by the speed of finished ones, or by `speed`, images per second of a script."""
    took = {job: job.record["seconds"] for job in jobs if job.finished}
    rates = dict(speed)
    for script in {job.script for job in took}:
        alike = [job for job in took if job.script == script]
        rates[script] = sum(job.work for job in alike) / sum(took[job] for job in alike)
    return {job: took.get(job, job.work / rates[job.script]) for job in jobs}


def show(jobs: list[Job], speed: dict[str, float], side_by_side: int) -> None:
    """List the jobs and what they take (`seconds_of`)."""
    finished, left = {job for job in jobs if job.finished}, 0.0
    for job, seconds in seconds_of(jobs, speed).items():
        left += 0 if job in finished else seconds
        state = "finished" if job in finished else "stale" if job.stale else "begun" if job.record else "to do"
        print(f"{state:8}  {seconds / 60:7.1f} min  {job.name}")
    scripts = {job.script: sum(other.script == job.script for other in jobs) for job in jobs}
    counts = ", ".join(f"{count} of {script}.py" for script, count in scripts.items())
    print(f"{counted(len(jobs), 'job')} ({counts}), {len(finished)} finished; about {duration(left)} on one core or GPU are left,")
    print(f"{duration(left / side_by_side)} with --jobs {side_by_side}. " + ", ".join(f"{k} {v} images/s" for k, v in speed.items())
          + " assumed where no job has finished")  # fmt: skip
