"""A run of the tuner: problem classes on one device, one after the other, and their winners.

Each class has its search and its study. What wins goes to the config cache at once, so that a run
that is stopped keeps what it has found.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256

import optuna

from numflash.machine_code.compiler import versions
from numflash.machine_code.sources import family_hash
from numflash.problem.classes import ProblemClass
from numflash.selection import store
from numflash.selection.choice import FUSED
from numflash.selection.entries import DeviceKey, Entry

from .. import model
from ..measuring.measurer import Measurer
from ..records import Record
from ..space.configs import Budgets, Space
from ..space.machines import Machine
from .plan import Plan, compile_time
from .pool import CompilePool
from .progress import Progress
from .results import Result
from .search import Search, StoppingRules, make_sampler
from .studies import FORMAT, earlier_records, open_study

_log = logging.getLogger("numflash")


@dataclass(frozen=True)
class Options:
    """Options of a search.

    Attributes:
        rules: when a class is done; its seconds are those of the whole run.
        budgets: what a kernel may take.
        sampler: a name of `SAMPLERS`.
        seed: of the sampler; None for another order each time.
        jobs: compiler processes.
        storage: as `studies.open_storage` takes it.
    """

    rules: StoppingRules = field(default_factory=StoppingRules)
    budgets: Budgets = field(default_factory=Budgets)
    sampler: str = "tpe"
    seed: int | None = None
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)
    storage: str | None = None


class Session:
    """Tunes classes on one device. A context manager, which ends the compilers.

    Attributes:
        results: of the classes tuned so far, also of one whose search was stopped in its middle.
        entries: what was remembered of them.
    """

    def __init__(
        self,
        device: DeviceKey,
        machine: Machine,
        measurer: Measurer | None,
        options: Options,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Nothing runs yet.

        Args:
            device: whose configs these are.
            machine: the device, as the model knows it.
            measurer: measures on the device; None has the model judge.
            options: how to search.
            clock: seconds.
        """
        self.device, self.machine, self.measurer = device, machine, measurer
        self.options, self._clock = options, clock
        self.origin = "predicted" if measurer is None else "measured"
        self.results: list[Result] = []
        self.entries: list[Entry] = []
        self._pool = CompilePool(device.arch, options.jobs)
        self._deadline = None
        if options.rules.seconds is not None:
            self._deadline = clock() + options.rules.seconds

    def __enter__(self) -> "Session":
        self._pool.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._pool.__exit__(*exception)

    def spaces(self, problems: list[ProblemClass]) -> list[Space]:
        """The spaces of these classes, without those whose kernel would not run on the machine.

        Raises:
            EmptySpaceError: one of them is empty.
        """
        about = self.machine, self.options.budgets, self.measurer is not None
        spaces = [Space(problem, *about) for problem in problems]
        spaces = [space for space in spaces if space.runs]
        if self.measurer is None:
            # One kernel for all gradients runs only where it was measured to be faster.
            spaces = [space for space in spaces if space.problem.family != FUSED]
        for space in spaces:
            space.expect_any()
        return spaces

    def plan(self, spaces: Sequence[Space]) -> Plan:
        """Plan the tuning of these spaces; compiles some defaults for it unless time is short.

        Raises:
            StorageError: the studies cannot be read.
            NoCompilerError: compiler processes cannot be started.
        """
        rules, names = self.options.rules, [self._study_name(space) for space in spaces]
        earlier = earlier_records(self.options.storage, names)
        is_measured = self.measurer is not None
        sizes = [rules.size(space, is_measured) for space in spaces]
        done = [len(records) for records in earlier]
        left = []
        if rules.seconds is None:
            left = [s for s, size, n in zip(spaces, sizes, done, strict=True) if n < size]
        everything = [record for records in earlier for record in records]
        jobs, seconds = self.options.jobs, rules.seconds
        time_ms = compile_time(left, everything, self._pool, jobs)
        return Plan(self.device.name, sizes, done, time_ms, jobs, seconds, is_measured)

    def compile_ahead(self, spaces: Sequence[Space]) -> None:
        """Have the defaults of these spaces compiled at once: the model waits for each of them."""
        for space in spaces:
            self._pool.submit(space.default, space.problem.traits)

    def tune(self, space: Space, classes_left: int, title: str, quiet: bool = False) -> Result:
        """Search a space, and remember the winner.

        Args:
            space: of the class to tune.
            classes_left: classes that share the time left, this one included.
            title: for the progress bar.
            quiet: show no progress.

        Raises:
            StorageError: the study cannot be used.
            LookupError: no config worked.
            NoCompilerError: compiler processes cannot be started.

        Whatever ends the search early, the best so far is remembered.
        """
        rules, sampler = self._rules(classes_left), self.options.sampler
        study = self._study(space)
        search = Search(
            space,
            study,
            self._pool,
            self.measurer,
            rules,
            sampler=sampler,
            first=[entry.config for entry in self._incumbents(space)],
            ahead=self.options.jobs + 2,
            clock=self._clock,
        )
        with Progress(
            search.size,
            title,
            time_budget=rules.seconds,
            earlier=search.ledger.records(),
            quiet=quiet,
        ) as progress:
            try:
                search.run(progress.update, progress.refresh)
                if not search.ledger.records():
                    raise LookupError(
                        f"no config of {space.problem} was tried: the time was over before"
                    )
                return self._conclude(space, search, progress)
            except BaseException:
                with suppress(LookupError):
                    self._conclude(space, search, progress, again=False)
                raise

    def _conclude(
        self, space: Space, search: Search, progress: Progress, again: bool = True
    ) -> Result:
        """Name the winner of a search, remember it, and keep the result.

        Raises LookupError if there is none.
        """
        default, best = search.winner(again)
        progress.name_best(best)
        self._remember(space, search, default, best)
        result = Result(
            device=self.device.name,
            arch=self.device.arch,
            num_sms=self.machine.num_sms,
            problem=space.problem,
            origin=self.origin,
            default=default,
            best=best,
            records=search.records(),
            floor_ms=search.floor_ms,
            space_size=len(space.feasible) + space.excluded.total(),
            pruned=dict(space.excluded),
            pruned_examples=space.examples,
            importances=search.importances(),
            budgets={
                "smem_limit_bytes": space.machine.limits.max_smem_per_block,
                "sram_budget_bytes": space.budgets.smem_bytes,
                "min_occupancy": space.budgets.min_occupancy or None,
                "max_registers": 255,
            },
        )
        self.results.append(result)
        return result

    def _rules(self, classes_left: int) -> StoppingRules:
        """The stopping rules of one class; the time left is shared evenly."""
        rules = self.options.rules
        if self._deadline is None:
            return rules
        left = max(0.0, self._deadline - self._clock())
        return StoppingRules(rules.trials, left / max(1, classes_left), rules.target)

    def _study(self, space: Space) -> optuna.Study:
        sampler = make_sampler(self.options.sampler, self.options.seed)
        return open_study(self.options.storage, self._study_name(space), sampler)

    def _study_name(self, space: Space) -> str:
        """The name of a study: all that its trials share, so that they can be compared."""
        made = [
            family_hash(space.problem.family),
            sorted(versions().items()),
            space.budgets,
            space.dimensions,
        ]
        made += [model.source_hash(), FORMAT]
        digest = sha256(repr(made).encode()).hexdigest()[:12]
        return f"{space.problem} on {self.device}, {self.origin}, {digest}"

    def _incumbents(self, space: Space) -> list[Entry]:
        """The entries remembered for a class, whose configs have to be beaten."""
        return [entry for entry in store.read(self.device) if entry.problem == space.problem]

    def _remember(self, space: Space, search: Search, default: Record, best: Record) -> None:
        """Write the winner to the config cache; an error is logged.

        An entry whose config this search has tried gives way even where its time is shorter: that
        time is of another run, under another clock or of another model.
        """
        if not math.isfinite(best.time_ms):
            return
        records = search.ledger.records()
        tried = {record.config for record in records if math.isfinite(record.time_ms)}
        retried = [
            entry
            for entry in self._incumbents(space)
            if entry.origin == self.origin and entry.config in tried
        ]
        entry = Entry(
            problem=space.problem,
            config=best.config,
            time_ms=best.time_ms,
            spread=best.spread,
            origin=self.origin,
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            kernels=family_hash(space.problem.family),
            compilers=versions(),
            default_config=default.config,
            default_ms=default.time_ms if math.isfinite(default.time_ms) else None,
        )
        self.entries.append(entry)
        try:
            store.add(self.device, [entry], [e for e in retried if e.key == entry.key])
        except OSError as error:
            path = store.path_of(self.device)
            _log.warning("cannot write %s (%s): the config found is not remembered", path, error)
