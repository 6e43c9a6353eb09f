"""F1, F4, F5, F8 together: everything is killed, stopped past its lease, cut off and left without answers, at random.

Users post jobs, pause, resume and cancel them meanwhile. When it is over every job has ended as its user wished, with the
history and the weights of a run that nobody disturbed.
"""

import heapq
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.faults.line import Line, NotPossible, Run
from tests.faults.network import DEAF, DROP, OPEN, REJECT
from tests.faults.world import Plan, World
from tests.postgres import NoPostgres, Postgres


@dataclass(frozen=True)
class Weather:
    """How bad it gets. Weights are of actions against each other."""

    seconds: float = 60
    jobs: int = 30
    workers: int = 3
    slots: int = 2
    pause: tuple[float, float] = (0.05, 0.5)  # between two actions
    trainer: float = 4
    worker: float = 3
    server: float = 1.5
    zombie: float = 2.5
    cut: float = 2
    steps: tuple[int, int] = (30, 150)
    lose_answers: float = 0.08
    lose_requests: float = 0.03
    hold: float = 0.03
    cancels: float = 0.15
    pauses: float = 0.3
    save_seconds: float = 0.03
    rest: tuple[float, float] = (0, 0.6)  # of a killed worker, until it starts again
    to_the_end: bool = True  # wait for the jobs


@dataclass
class Storm:
    """One run of it."""

    world: World
    weather: Weather
    random: random.Random
    errors: list[str] = field(default_factory=list)
    _later: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: int = 0

    def run(self) -> None:
        """Stir for the given time, then let everything end in peace."""
        world, weather = self.world, self.weather
        world.start_servers()
        for i in range(weather.workers):
            world.add_worker(f"worker-{i}", slots=weather.slots)
        self._set_faults()
        users = [
            threading.Thread(target=self._guarded, args=(self._use, number), name=f"user-{number}")
            for number in range(2)
        ]
        for user in users:
            user.start()
        deadline = time.monotonic() + weather.seconds
        while time.monotonic() < deadline:
            self._act()
            until = min(deadline, time.monotonic() + self.random.uniform(*weather.pause))
            while (left := until - time.monotonic()) > 0:
                self._do_what_is_due()
                time.sleep(min(left, 0.05))
        self._calm()
        for user in users:
            user.join(90)
            if user.is_alive():
                self.errors.append(f"{user.name} hangs")

    def let_end(self, *, seconds: float = 60) -> None:
        """Wait until every job is over; paused ones are resumed."""
        deadline = time.monotonic() + seconds
        while not self.world.all_over():
            if time.monotonic() > deadline:
                self.errors.append(
                    f"jobs did not end within {seconds:g} s of calm: {dict(self.world.states())}"
                )
                return
            for plan in list(self.world.plans.values()):
                if plan.job_id and self.world.job(plan)["want"] == "pause":
                    self.world.call("POST", f"/jobs/{plan.job_id}/resume", accept=(409,))
            time.sleep(0.2)

    # ------------------------------------------------------------ what is done to the service

    def _act(self) -> None:
        weather = self.weather
        weights = {
            self._kill_trainer: weather.trainer,
            self._kill_worker: weather.worker,
            self._kill_server: weather.server,
            self._freeze: weather.zombie,
            self._cut: weather.cut,
        }
        self.random.choices(list(weights), list(weights.values()))[0]()

    def _kill_trainer(self) -> None:
        if alive := self.world.trainers():
            self.world.kill_trainer(self.random.choice(alive))

    def _kill_worker(self) -> None:
        names = self._awake()
        if names:
            name = self.random.choice(names)
            self.world.kill_worker(name)
            self._after(self.random.uniform(*self.weather.rest), lambda: self._start_worker(name))

    def _start_worker(self, name: str) -> None:
        box = self.world.workers[name]
        if box.process is None or box.process.poll() is not None:
            self.world.start_worker(name)

    def _kill_server(self) -> None:
        # One in three dies behind something that still takes connections; of several, the others go on.
        port = self.random.choice(self.world.ports)
        self.world.kill_server(port=port, refused=self.random.random() < 0.67)
        time.sleep(self.random.uniform(0, 0.5))
        self.world.start_server(port=port)

    def _freeze(self) -> None:
        """A zombie: it wakes after its lease is over, and what it sent before it slept arrives then."""
        names = self._awake()
        if not names or len(names) < len(self.world.workers) - 1:
            return
        name = self.random.choice(names)
        box = self.world.workers[name]
        seconds = self.world.lease_seconds * self.random.uniform(1.2, 2.2)
        self.world.freeze_worker(name, seconds, self.random)
        box.link.faults.hold = self.weather.hold

        def wake() -> None:
            if box.stopped_until is not None:
                self.world.wake_worker(name)

        self._after(seconds, wake)

    def _cut(self) -> None:
        box = self.world.workers[self.random.choice(list(self.world.workers))]
        box.link.faults.mode = self.random.choice([DROP, REJECT, DEAF])

        def mend() -> None:
            box.link.faults.mode = OPEN

        self._after(self.world.lease_seconds * self.random.uniform(0.3, 2.0), mend)

    def _awake(self) -> list[str]:
        return [
            name
            for name, box in self.world.workers.items()
            if box.stopped_until is None and box.process is not None and box.process.poll() is None
        ]

    def _set_faults(self) -> None:
        for link in self.world.network.links:
            link.faults.lose_answers = self.weather.lose_answers
            link.faults.lose_requests = self.weather.lose_requests
            if link is not self.world.users:
                link.faults.hold = self.weather.hold
                link.faults.hold_seconds = (1.0, 2.5 * self.world.lease_seconds)

    def _calm(self) -> None:
        """No more faults; everybody is awake and works."""
        self.world.network.heal()
        for name, box in self.world.workers.items():
            if box.process is not None and box.process.poll() is None:
                box.process.signal(signal.SIGCONT)
                box.stopped_until = None
            self._start_worker(name)
        self.world.start_servers()

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._later, (time.monotonic() + seconds, self._count, act))

    def _do_what_is_due(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()

    # ------------------------------------------------------------ users

    def _use(self, number: int) -> None:
        """Post a share of the jobs over the time, and steer some of them."""
        dice = random.Random(f"user {number} {self.world.seed}")
        weather = self.weather
        share = range(number, weather.jobs, 2)
        for _ in share:
            time.sleep(dice.uniform(0, 1.6 * weather.seconds / (len(share) + 1)) * 0.8)
            plan = self.world.plan(
                steps=dice.randint(*weather.steps),
                save_steps=dice.randint(5, 20),
                pace=dice.uniform(0.005, 0.03),
                priority=dice.choice([0, 0, 0, 1]),
                metadata={"save_seconds": str(dice.uniform(0, 2 * weather.save_seconds))},
            )
            self.world.submit(plan, seconds=weather.seconds + 60)
            if dice.random() < weather.cancels:
                time.sleep(dice.uniform(0, 3))
                self.world.cancel(plan)
            elif dice.random() < weather.pauses:
                self._pause_and_resume(plan, dice)

    def _pause_and_resume(self, plan: Plan, dice: random.Random) -> None:
        time.sleep(dice.uniform(0, 2))
        self.world.call("POST", f"/jobs/{plan.job_id}/pause", accept=(409,))
        time.sleep(dice.uniform(0, 2))
        self.world.call("POST", f"/jobs/{plan.job_id}/resume", accept=(409,))

    def _guarded(self, act: Callable[[int], None], number: int) -> None:
        try:
            act(number)
        except Exception as error:  # the edge of a thread: it counts as a violation
            self.errors.append(f"user {number}: {error!r}")


def storm(world: World, weather: Weather) -> Storm:
    """Stir, calm down, wait for the end, restart the server with SIGKILL: the state that is to be checked."""
    run = Storm(world, weather, random.Random(f"storm {world.seed}"))
    run.run()
    if weather.to_the_end:
        run.let_end()
    world.stop_workers()
    world.kill_servers()
    world.start_servers()
    world.violations += run.errors
    return run


def chaos(line: Run) -> None:
    weather = Weather()
    if line.long:
        weather = replace(weather, seconds=600, jobs=250)
    world = line.world()
    storm(world, weather)
    line.check(world)


def several_servers(line: Run) -> None:
    """The same on PostgreSQL, with three servers behind one address."""
    try:
        postgres = Postgres.start()
    except NoPostgres as error:
        raise NotPossible(f"PostgreSQL: {error}") from None
    try:
        weather = Weather(seconds=25, jobs=14)
        if line.long:
            weather = replace(weather, seconds=300, jobs=120)
        world = line.world(database_url=postgres.create(empty=True), num_servers=3)
        storm(world, weather)
        line.check(world)
        world.close()
    finally:
        postgres.stop()


LINES = [
    Line("chaos", "F1 F4 F5 F8", chaos, must_fence=True),
    Line("several servers", "F4 F5 F8", several_servers, must_fence=True),
]
