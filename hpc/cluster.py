"""The door to Dask: a client of a cluster that lives as long as the ``with`` block.

`client` is all that callers see; which machines stand behind it is decided here: processes of this machine,
or, where the step is a Slurm job (``HPC_SITE``), worker jobs of their own.
"""

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from hpc import durable, mpi, progress, rank, slurm
from hpc.site import Site

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MEMORY_VARIABLE = "HPC_MEMORY"  # bytes that the launcher gives to all workers of a node
SITE_VARIABLE = "HPC_SITE"  # the site, as JSON
FOLDER_VARIABLE = "HPC_FOLDER"  # the step's folder
NODES_VARIABLE = "HPC_NODES"  # number of worker jobs, between which the workers are shared
TIME_VARIABLE = "HPC_TIME"  # seconds that a worker job may take
THREAD_VARIABLES = tuple(f"{library}_NUM_THREADS" for library in ("OMP", "OPENBLAS", "MKL", "NUMBA", "RAYON"))
"""Tell libraries how many threads of their own to start."""

_DEATH = 60  # seconds without a scheduler after which a worker ends by itself
_LOOK = 1.0  # seconds between looks at the workers
_ASK = 5.0  # seconds between questions to Slurm while workers are missing
_SOUND = 60.0  # seconds of work after which a job's end says nothing against the next one
_WINDOW = 600.0  # seconds within which jobs that end before that are counted
_IDLE = 30  # seconds for which an adaptive cluster keeps a worker that has nothing to do


class WorkersLost(RuntimeError):
    """Worker jobs end as soon as they start; the message has the last one's log."""


class _Cluster(Protocol):
    """What `client` needs of a cluster of `distributed`."""

    dashboard_link: str


@contextmanager
def client(
    n_workers: int | None = None, memory: int | None = None, scratch: Path | None = None
) -> Iterator[Any]:
    """A `distributed.Client` whose workers are there; the address of its dashboard is published.

    Workers have one thread each. A worker that dies is replaced, and its tasks run again elsewhere: tasks
    must leave the same files when they run twice.

    On one machine, one worker runs inside this process, where it can be debugged, and every server listens on
    the loopback interface alone. On Slurm the block starts with the first worker and the others join it when
    their jobs start; jobs that end are replaced; the dashboard has a path that nobody can guess; SIGTERM
    leaves the block with SystemExit. Between processes connections are encrypted and need a key that only
    this user has: nobody else, on the same machine either, can send tasks.

    Parameters
    ----------
    n_workers
        by default the number that the launcher asked for (``HPC_WORLD_SIZE``), else 1.
    memory
        bytes that one worker may use before it is paused and then replaced; by default its share of what the
        launcher gave (``HPC_MEMORY``), else of the machine's.
    scratch
        folder for the workers' own files; by default the system's folder for temporary files. On Slurm the
        site's own comes first.

    Raises
    ------
    ValueError
        for fewer than one worker, and for workers that the worker jobs cannot share evenly.
    TimeoutError
        where the workers of this machine do not come up.
    WorkersLost
        also out of the block, where worker jobs cannot be started.
    """
    from distributed import Client

    number = int(os.environ.get(mpi.VARIABLE, "1")) if n_workers is None else n_workers
    if number < 1:
        raise ValueError(f"a cluster needs at least one worker, got {number}")
    site = Site.model_validate_json(os.environ.get(SITE_VARIABLE, "{}"))
    if site.launcher == "slurm":  # in an "allocation" the workers are processes of this node
        with _client_of_jobs(number, memory, scratch, site) as connected:
            yield connected
        return
    if memory is None and MEMORY_VARIABLE in os.environ:
        memory = int(os.environ[MEMORY_VARIABLE]) // number
    with _local_cluster(number, memory, scratch) as cluster, Client(cluster) as connected:
        connected.wait_for_workers(number, timeout=120)
        log.info("%d Dask worker%s; dashboard: %s", number, "s" * (number > 1), cluster.dashboard_link)
        progress.link("dashboard", cluster.dashboard_link)
        yield connected


def worker_jobs(folder: Path) -> list[str]:
    """Ids of all worker jobs that the attempts of the step in ``folder`` queued."""
    record = _logs(folder) / "jobs.json"
    return list(durable.read_json(record)) if record.exists() else []


def _logs(folder: Path) -> Path:
    return folder / ".slurm" / "workers"


@contextmanager
def _local_cluster(n_workers: int, memory: int | None, scratch: Path | None) -> Iterator[_Cluster]:
    """Workers on this machine."""
    import dask
    from distributed import LocalCluster
    from distributed.security import Security

    alone = n_workers == 1
    one_thread = dict.fromkeys(THREAD_VARIABLES, "1")
    settings = {
        "distributed.nanny.pre-spawn-environ": {
            **dask.config.get("distributed.nanny.pre-spawn-environ"),
            **one_thread,
        },
        "distributed.dashboard.link": f"http://{LOOPBACK}:{{port}}/status",
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=not alone,
            memory_limit="auto" if memory is None else memory,
            host=None if alone else LOOPBACK,  # one worker needs no address
            security=None if alone else Security.temporary(),  # all users of a machine share its loopback
            dashboard_address=f"{LOOPBACK}:0",
            worker_dashboard_address=f"{LOOPBACK}:0",
            local_directory=None if scratch is None else str(scratch),
        ) as cluster,
    ):
        yield cluster


@contextmanager
def _client_of_jobs(number: int, memory: int | None, scratch: Path | None, site: Site) -> Iterator[Any]:
    """A client whose workers are Slurm jobs."""
    from distributed import Client

    n_jobs = int(os.environ.get(NODES_VARIABLE, number))
    if number % n_jobs:
        raise ValueError(
            f"{n_jobs} worker jobs cannot share {number} workers evenly (resources: ranks must be a multiple "
            "of nodes)"
        )
    processes = number // n_jobs
    if memory is None and MEMORY_VARIABLE in os.environ:
        memory = int(os.environ[MEMORY_VARIABLE]) // processes
    logs = _logs(Path(os.environ[FOLDER_VARIABLE]).absolute())
    logs.mkdir(parents=True, exist_ok=True)
    with (
        _exit_on_sigterm(),
        _job_cluster(processes, memory, site.scratch or scratch, site, logs) as cluster,
        Client(cluster) as connected,
    ):
        if site.dask.adaptive:
            cluster.adapt_jobs(n_jobs)
        else:
            cluster.scale(jobs=n_jobs)
        log.info("%d worker jobs; dashboard: %s", n_jobs, cluster.dashboard_link)
        progress.link("dashboard", cluster.dashboard_link)
        watch = _Watch(cluster, connected, n_jobs, site.dask.adaptive, logs)
        try:
            watch.wait()
            yield connected
        except Exception as error:
            if watch.failure is not None and error is not watch.failure:
                raise watch.failure from error
            raise
        finally:
            watch.stop()


@contextmanager
def _job_cluster(
    processes: int, memory: int | None, scratch: Path | None, site: Site, logs: Path
) -> Iterator[Any]:
    """A `dask_jobqueue.SLURMCluster` without a worker.

    Its classes are made here: their bases must not be imported before they are needed.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    from dask_jobqueue.slurm import SLURMCluster, SLURMJob

    signal.signal(signal.SIGINT, on_interrupt)  # its import lets Ctrl-C end the process as if all were well
    import dask
    from distributed import Scheduler
    from distributed.deploy.adaptive import Adaptive
    from distributed.deploy.cluster import Cluster
    from distributed.deploy.spec import ProcessInterface
    from distributed.security import Security
    from distributed.utils import get_ip_interface

    path = secrets.token_urlsafe(16)

    class Dashboard(Scheduler):
        def start_http_server(self, *args: Any, **kwargs: Any) -> None:
            super().start_http_server(*args, **kwargs)
            _hide(self.http_application, path)

    class Job(SLURMJob):
        failure: slurm.SlurmError | None = None

        async def start(self) -> None:
            try:
                await super().start()
            except slurm.SlurmError as error:  # for the watch
                self.failure = error
                await ProcessInterface.start(self)
            else:
                record = logs / "jobs.json"
                durable.write_json(record, [*worker_jobs(logs.parents[1]), self.job_id])

        async def _submit_job(self, script: str) -> str:
            return await asyncio.to_thread(slurm.run, ["sbatch", script])

        async def close(self) -> None:
            if self.job_id is not None:
                try:
                    await asyncio.to_thread(slurm.cancel, self.job_id)
                except slurm.SlurmError as error:
                    log.warning(
                        "worker job %s, not cancelled, ends %d s after this process: %s",
                        *(self.job_id, _DEATH, error),
                    )
            await ProcessInterface.close(self)

    def job_of(worker: Any) -> str:
        return str(worker.name).rpartition("-")[0] if processes > 1 else str(worker.name)

    class WholeJobs(Adaptive):
        """Dask's rules, but that a job stays while one of its workers works."""

        async def target(self) -> int:
            cluster: Any = self.cluster
            at_work = {job_of(worker) for worker in cluster.scheduler.workers.values() if worker.processing}
            return processes * max(len(at_work), -(-(await super().target()) // processes))

    class Jobs(SLURMCluster):
        job_cls = Job

        def _new_worker_name(self, number: int) -> str:
            return f"job-{secrets.token_hex(4)}"  # never that of a job which is ending

        def _get_worker_security(self, security: object) -> None:
            return None  # the command names the files, quoted

        def _update_worker_status(self, op: str, msg: Any) -> None:
            # Not SpecCluster's, which cancels the job of a worker that restarts slowly: the watch decides.
            Cluster._update_worker_status(self, op, msg)

        def adapt_jobs(self, most: int) -> None:
            self.adapt(
                Adaptive=WholeJobs,
                minimum=processes,
                maximum=processes * most,
                worker_key=job_of,
                interval="1s",
                wait_count=_IDLE,
            )

    address = LOOPBACK
    if site.dask.dashboard == "interface":
        address = get_ip_interface(site.interface) if site.interface else socket.gethostname()
    here = {"interface": site.interface} if site.interface else {"host": socket.gethostname()}
    security = Security.temporary()
    with (
        dask.config.set({"distributed.dashboard.link": f"http://{address}:{{port}}/{path}/status"}),
        _private(logs.parent / "tls", security) as files,
        Jobs(
            cores=processes,
            processes=processes,
            memory="1 GB",  # of no effect: the command and the directives say it
            shebang="#!/bin/bash",
            job_directives_skip=["#SBATCH"],  # all of its own, whose short names a site could not skip
            job_extra_directives=_directives(processes, memory, site, logs),
            job_script_prologue=[*slurm.prologue(site), *(f"export {name}=1" for name in THREAD_VARIABLES)],
            python=shlex.join(site.command(["-P"])),
            worker_extra_args=_arguments(memory, scratch, site, files),
            death_timeout=_DEATH,
            security=security,
            scheduler_cls=Dashboard,
            scheduler_options={"dashboard_address": f"{address}:0", "http_prefix": path, **here},
        ) as cluster,
    ):
        yield cluster


def _directives(processes: int, memory: int | None, site: Site, logs: Path) -> list[str]:
    """Options of sbatch for one worker job."""
    token = os.environ[rank.JOB_VARIABLE]
    seconds = int(os.environ[TIME_VARIABLE]) if TIME_VARIABLE in os.environ else site.time
    asked = {
        "job-name": f"galdist-dask-{token}",
        "comment": token,  # by which they are found and ended
        "output": f'"{logs}/%j.out"',
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": processes,
        "mem": None if memory is None else f"{-(-memory * processes // 2**20)}M",
        "time": None if seconds is None else -(-seconds // 60),
    }
    options = [f"--{key}={value}" for key, value in asked.items() if value is not None]
    # The watch replaces jobs; one that Slurm starts again might look for a scheduler that is gone.
    options.append("--no-requeue")
    skipped = site.skip_directives
    return [*(o for o in options if o.partition("=")[0] not in skipped), *site.directives]


def _arguments(memory: int | None, scratch: Path | None, site: Site, tls: dict[str, Path]) -> list[str]:
    """The end of the worker's command, for the shell."""
    arguments = f"--memory-limit {memory or 'auto'} --no-dashboard --dashboard-address {LOOPBACK}:0".split()
    for name, path in tls.items():
        arguments += [f"--tls-{name}", shlex.quote(str(path))]
    if scratch is not None:
        arguments += ["--local-directory", f'"{scratch}"']  # $TMPDIR is the node's
    return [*arguments, *(["--interface", site.interface] if site.interface else ["--host", '"$(hostname)"'])]


@contextmanager
def _private(folder: Path, security: Any) -> Iterator[dict[str, Path]]:
    """The workers' TLS files, in a folder that only this user can read."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(mode=0o700)
    try:
        texts = security.get_tls_config_for_role("worker")
        files = {name: folder / f"{name}.pem" for name in ("ca_file", "cert", "key")}
        for name, file in files.items():
            file.write_text(texts[name])
        yield {name.replace("_", "-"): file for name, file in files.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hide(application: Any, path: str) -> None:
    """Answer 404 outside ``/path/``: Dask redirects ``/`` to it, and lists it in ``/sitemap.json``."""
    from tornado.web import ErrorHandler

    find = application.find_handler

    def guarded(request: Any, **kwargs: Any) -> Any:
        if request.path.startswith(f"/{path}/"):
            return find(request, **kwargs)
        return application.get_handler_delegate(request, ErrorHandler, {"status_code": 404})

    application.find_handler = guarded


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM leave the block, and so cancel the worker jobs, where it would end the process at once."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # Slurm and the supervisor both send it
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Watch:
    """Replaces worker jobs that end, in the cluster's event loop.

    Jobs that end before `_SOUND` seconds of work are counted: after more than ``3 + n_jobs`` within `_WINDOW`
    seconds no more are started until some time has passed. Where then none is left, the client is closed, so
    that whoever waits for a task wakes up, and `failure` says why.
    """

    def __init__(self, cluster: Any, client: Any, n_jobs: int, adaptive: bool, logs: Path) -> None:
        self.cluster, self.client, self.logs = cluster, client, logs
        self.n_jobs, self.adaptive = n_jobs, adaptive
        self.seen: dict[str, tuple[float, float]] = {}
        """Job -> when it was first and last seen to have workers."""
        self.ended: dict[str, str] = {}
        """Job to replace -> what became of it."""
        self.short: deque[float] = deque()
        """When jobs ended too soon."""
        self.asked = float("-inf")
        self.told = ""
        self.failure: Exception | None = None
        """Why there are no workers."""
        self.future = asyncio.run_coroutine_threadsafe(self._run(), cluster.loop.asyncio_loop)

    def wait(self) -> None:
        """Until the first worker is there."""
        while not self.cluster.scheduler.workers:
            if self.failure is not None:
                raise self.failure
            time.sleep(0.05)

    def stop(self) -> None:
        """End the watch: jobs that end from now on are meant to."""
        self.future.cancel()

    async def _run(self) -> None:
        try:
            while True:
                missing = self._missing()
                if missing and time.monotonic() - self.asked >= _ASK:
                    await self._ask(missing)
                if self.ended:
                    self._replace()
                await asyncio.sleep(_LOOK)
        except Exception as error:
            self.failure = error  # first: whoever the next line wakes looks here
            await self.client.close()
            raise

    def _missing(self) -> dict[str, Any]:
        """Jobs that are without some of their workers."""
        now = time.monotonic()
        here = {worker.name for worker in self.cluster.scheduler.workers.values()}
        missing = {}
        for name, spec in self.cluster.worker_spec.items():
            workers = {f"{name}{suffix}" for suffix in spec.get("group", [""])}
            if here & workers:
                self.seen[name] = (self.seen.get(name, (now, now))[0], now)
            if not workers <= here and name in self.cluster.workers and name not in self.ended:
                missing[name] = self.cluster.workers[name]
        return missing

    async def _ask(self, missing: dict[str, Any]) -> None:
        """Ask Slurm which of these jobs have ended."""
        now = self.asked = time.monotonic()
        try:
            states = await asyncio.to_thread(
                slurm.states, [job.job_id for job in missing.values() if job.job_id]
            )
        except slurm.SlurmError as error:
            log.warning("%s", error)  # its silence ends no job
            return
        for name, job in missing.items():
            first, last = self.seen.get(name, (now, now))
            state = states.get(job.job_id)
            if job.failure is not None:
                why = str(job.failure)
            elif state is not None and (state.is_over or state.state == "COMPLETING"):
                why = f"worker job {job.job_id} ended: {_describe(state)}"
            elif now - last > 2 * _DEATH:
                why = f"worker job {job.job_id} is silent: {_describe(state)}"
            else:
                continue
            log.warning("%s", why)
            self.ended[name] = why
            if last - first < _SOUND and not isinstance(job.failure, slurm.Unreachable):
                self.short.append(now)
        counts = Counter(_describe(state) for state in states.values() if not state.is_over)
        text = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        if text and text != self.told:
            log.info("worker jobs without all their workers: %s", text)
        self.told = text

    def _replace(self) -> None:
        """Start a job for each that ended, as far as that makes sense."""
        while self.short and self.short[0] < time.monotonic() - _WINDOW:
            self.short.popleft()
        if len(self.short) <= 3 + self.n_jobs:
            for name in self.ended:
                self.cluster.worker_spec.pop(name, None)
            self.ended.clear()
            # an adaptive cluster asks for others itself
            self.cluster.scale(jobs=len(self.cluster.worker_spec) if self.adaptive else self.n_jobs)
        elif self.ended.keys() >= self.cluster.worker_spec.keys():
            raise WorkersLost(self._story())

    def _story(self) -> str:
        from hpc.job import last_lines

        name, why = list(self.ended.items())[-1]
        lines = [
            f"no Dask worker is left: {len(self.short)} worker jobs ended before {_SOUND:.0f} s of work.",
            f"The last: {why}",
        ]
        output = self.logs / f"{self.cluster.workers[name].job_id}.out"
        if tail := last_lines(output, 15):
            lines += [f"last lines of {output}:", *(f"  | {line}" for line in tail)]
        return "\n".join(lines)


def _describe(state: slurm.JobState | None) -> str:
    if state is None:
        return "unknown to Slurm"
    reason = f" ({state.reason})" if state.reason else ""
    return f"{state.state}{reason}" + (f" on {', '.join(state.nodes)}" if state.nodes else "")
