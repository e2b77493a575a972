"""The built-in story world: people walk between rooms, carry objects about, and are asked about it.

A simulator of our own in the spirit of the bAbI tasks (Weston et al. 2015, arXiv:1502.05698): no text is taken from
them. A row depends on nothing but the config, the split and its index, so any worker can make any range of rows.

Training and validation never share a context: `split_of` decides a context's side by a hash of its text, and a story
that falls on the wrong side is told again. Two sides may still differ by no more than a synonym; they are disjoint as
texts, not as chains of events.
"""

import difflib
import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate

PEOPLE = ("Anna", "Daniel", "John", "Mary", "Peter", "Sandra")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "ball", "book", "cup", "key", "milk")
MOVES = ("went to", "moved to", "travelled to", "journeyed to")
TAKES = ("picked up", "took", "grabbed")
DROPS = ("put down", "dropped", "left")
COUNTS = ("none", "one", "two", "three")
MAX_CARRIED = len(COUNTS) - 1
MAX_EVENTS = 50
MAX_EVERYONE = 3
"""Most people in a story that is asked about with `everyone`, which keeps that answer short."""

KINDS = ("where", "everyone", "object", "has", "yesno", "count", "visited")
SENTENCE_KINDS = ("someone", "event")
"""Asked only where they are named: any of several sentences answers them, whose words must fit together."""
LONG_KINDS = ("log",)
"""Asked only where they are named: the whole story again in other words, seven tokens of words an event."""
ALL_KINDS = (*KINDS, *SENTENCE_KINDS, *LONG_KINDS)
DEFAULT_WEIGHTS = {kind: 4.0 if kind == "where" else 1.0 for kind in ALL_KINDS}
SPLITS = ("train", "validation")
VALIDATION_ONE_IN = 20
"""Share of all contexts on the validation side. No config field: two configs must never disagree about a side."""

Draw = Callable[[], float]
"""`random.Random.random`: of that class, the one method whose numbers Python promises to keep between versions."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What stories are told and what is asked about them."""

    seed: int = 0
    """Another seed gives other rows; it does not move a context to the other split."""
    kinds: tuple[str, ...] = KINDS
    """Kinds of question to ask, out of ALL_KINDS."""
    weights: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    """Relative share of each kind; a weight of a kind that `kinds` leaves out is not used."""
    min_events: int = 2
    """Fewest sentences in a story; two, a move and a pick-up, are what the object questions need."""
    max_events: int = 10
    """Most sentences in a story, five words each; the number is drawn uniformly."""
    min_people: int = 2
    """Fewest people a story draws from; a short one may still name fewer. With 1, the last room named answers 71 %
    of the `where` questions; with 2, 58 %."""
    max_people: int = 3
    """Most people a story draws from; `everyone` never draws from more than 3."""
    max_objects: int = 3
    """Most objects a story draws from."""
    closing_share: float = 0.5
    """Share of the plain stories that end by stating where somebody is."""

    def __post_init__(self) -> None:
        if type(self.seed) is not int:
            raise ValueError(f"world.seed must be a whole number, got {self.seed!r}")
        if not isinstance(self.kinds, tuple) or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"world.kinds must be a tuple of one or more different kinds, got {self.kinds!r}")
        for name, kinds in (("world.kinds", self.kinds), ("world.weights", self.weights)):
            for kind in kinds:
                if kind not in ALL_KINDS:
                    near = difflib.get_close_matches(str(kind), ALL_KINDS, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"{name} must name kinds out of {', '.join(ALL_KINDS)}, got {kind!r}{hint}")
        for kind in self.kinds:
            if kind not in self.weights:
                raise ValueError(
                    f"world.weights must have a weight for every kind in world.kinds, got none for {kind!r}; "
                    f"add it, or take {kind!r} out of world.kinds"
                )
        for kind, weight in self.weights.items():
            if not (isinstance(weight, int | float) and math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"world.weights.{kind} must be a finite number > 0, got {weight!r}; "
                    f"to leave a kind out, take it out of world.kinds"
                )
        _check_range("max_events", self.max_events, 2, MAX_EVENTS)
        _check_range("min_events", self.min_events, 2, self.max_events, "max_events=")
        _check_range("max_people", self.max_people, 1, len(PEOPLE))
        _check_range("min_people", self.min_people, 1, self.max_people, "max_people=")
        _check_range("max_objects", self.max_objects, 1, len(OBJECTS))
        if not 0.0 <= self.closing_share <= 1.0:
            raise ValueError(f"world.closing_share must be in [0, 1], got {self.closing_share!r}")


def _check_range(name: str, value: int, low: int, high: int, high_name: str = "") -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"world.{name} must be a whole number in [{low}, {high_name}{high}], got {value!r}")


class World:
    """The true state of a story; an event that cannot happen raises ValueError.

    Attributes:
        rooms: Person -> the room they are in; a person is absent until their first move.
        places: Object -> its holder or the room it lies in; an object is absent until it is first picked up.
        visited: Person -> the different rooms they have been in, the present one included, in order.
        log: What happened, as person, room of it and deed.
        told: What happened, in sentences.
    """

    __slots__ = ("rooms", "places", "visited", "log", "told")

    def __init__(self) -> None:
        self.rooms: dict[str, str] = {}
        self.places: dict[str, str] = {}
        self.visited: dict[str, list[str]] = {}
        self.log: list[str] = []
        self.told: list[str] = []

    def move(self, person: str, room: str) -> None:
        """Walk to another room, with all that the person carries."""
        if self.rooms.get(person) == room:
            raise ValueError(f"{person} cannot move to the {room}: already there; name another room")
        self.rooms[person] = room
        seen = self.visited.setdefault(person, [])
        if room not in seen:
            seen.append(room)
        self.log.append(f"{person}, {room}: came in.")

    def take(self, person: str, thing: str) -> None:
        """Pick up an object lying in the person's room; one not seen before may lie anywhere."""
        if person not in self.rooms:
            raise ValueError(f"{person} cannot take the {thing}: {person} is in no known room; move {person} first")
        place = self.places.get(thing, self.rooms[person])
        if place != self.rooms[person]:
            where = f"with {place}" if place in self.rooms else f"in the {place}"
            raise ValueError(
                f"{person} cannot take the {thing}: it is {where}; {person} is in the {self.rooms[person]}"
            )
        if len(self.carried(person)) == MAX_CARRIED:
            raise ValueError(
                f"{person} cannot take the {thing}: nobody carries more than {MAX_CARRIED}; drop one first"
            )
        self.places[thing] = person
        self.log.append(f"{person}, {self.rooms[person]}: took {thing}.")

    def drop(self, person: str, thing: str) -> None:
        """Leave a carried object in the person's room."""
        if self.places.get(thing) != person:
            raise ValueError(f"{person} cannot drop the {thing}: {person} does not carry it; take it first")
        self.places[thing] = self.rooms[person]
        self.log.append(f"{person}, {self.rooms[person]}: left {thing}.")

    def carried(self, person: str) -> list[str]:
        """Objects the person holds."""
        return [thing for thing, place in self.places.items() if place == person]

    def room_of(self, thing: str) -> str:
        """Room of an object that has been seen: its own, or its holder's."""
        place = self.places[thing]
        return self.rooms.get(place, place)


def split_of(context: str) -> str:
    """Side a context is on, `train` or `validation`; the same in every process, seed and config."""
    digest = blake2b(context.encode(), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % VALIDATION_ONE_IN else "validation"


def examples(config: WorldConfig, start: int, stop: int, split: str = "train") -> Iterator[dict]:
    """Yield the question rows with indices start <= i < stop; row i is the same in whatever range it is asked for.

    A validation row costs about 20 times a training row, for that many stories are told until one falls on its side.

    Args:
        config: The world.
        start: First index, at least 0.
        stop: Index after the last.
        split: `train` or `validation`; no context is ever on both.

    Returns:
        Rows with `kind`, `context`, `question`, `answer` and `answers`, the list of all valid answers: one, save for
        `visited` and SENTENCE_KINDS, whose `answer` is drawn uniformly from them.

    Raises:
        ValueError: If the range or the split is not allowed.
    """
    _check_rows(start, stop, split)
    return _examples(config, start, stop, split)


def stories(config: WorldConfig, start: int, stop: int, split: str = "train") -> Iterator[dict]:
    """Yield plain stories as `{"text": ...}`, with arguments and errors as in `examples`.

    Their contexts are other draws than those of `examples`, on the same side of the split.
    """
    _check_rows(start, stop, split)
    return _stories(config, start, stop, split)


def _check_rows(start: int, stop: int, split: str) -> None:
    if not 0 <= start <= stop:
        raise ValueError(f"start must be in [0, stop={stop}], got {start}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def _examples(config: WorldConfig, start: int, stop: int, split: str) -> Iterator[dict]:
    bounds = list(accumulate(config.weights[kind] for kind in config.kinds))
    for draw in _draws(config, "examples", start, stop, split):
        # The last bound is left out, so that rounding can never point past the last kind.
        kind = config.kinds[bisect_right(bounds, draw() * bounds[-1], hi=len(bounds) - 1)]
        world, context = _tell(config, draw, split, kind)
        question, answers = _ASK[kind](world, draw)
        answer = answers[0] if len(answers) == 1 else _pick(draw, answers)
        yield {"kind": kind, "context": context, "question": question, "answer": answer, "answers": answers}


def _stories(config: WorldConfig, start: int, stop: int, split: str) -> Iterator[dict]:
    for draw in _draws(config, "stories", start, stop, split):
        world, text = _tell(config, draw, split)
        if draw() < config.closing_share:
            text += " " + _where(world, draw)[1][0]
        yield {"text": text}


def _draws(config: WorldConfig, stream: str, start: int, stop: int, split: str) -> Iterator[Draw]:
    """Yield one freshly seeded source of numbers per row; it is valid until the next row."""
    rng = random.Random()
    for index in range(start, stop):
        key = f"{config.seed}/{stream}/{split}/{index}"
        rng.seed(int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big"))
        yield rng.random


def _tell(config: WorldConfig, draw: Draw, split: str, kind: str = "") -> tuple[World, str]:
    """Tell stories of one drawn length until one is on the asked side and can be asked about with `kind`."""
    most_people = MAX_EVERYONE if kind == "everyone" else len(PEOPLE)
    min_people, max_people = min(config.min_people, most_people), min(config.max_people, most_people)
    # All objects at once when they are to be counted: it doubles the answers "two" and "three" (10 % and 1 % of them).
    min_objects = config.max_objects if kind == "count" else 1
    need_object = kind in ("object", "has")
    num_events = _between(draw, config.min_events, config.max_events)
    while True:
        world = World()
        people = _some(draw, PEOPLE, _between(draw, min_people, max_people))
        objects = _some(draw, OBJECTS, _between(draw, min_objects, config.max_objects))
        world.told = [_happen(world, _pick(draw, people), objects, draw) for _ in range(num_events)]
        context = " ".join(world.told)
        if (world.places or not need_object) and split_of(context) == split:
            return world, context


def _happen(world: World, person: str, objects: list[str], draw: Draw) -> str:
    """Let one legal event happen to a person and return its sentence."""
    room = world.rooms.get(person)
    # First arrivals, and attempts that find no object in reach, are moves: with 0.55, 31 % of events handle one.
    if room is not None and draw() < 0.55:
        places = world.places
        reach = world.carried(person)
        if len(reach) < MAX_CARRIED:
            reach += [thing for thing in objects if places.get(thing, room) == room]
        if reach:
            thing = _pick(draw, reach)
            if places.get(thing) == person:
                world.drop(person, thing)
                return f"{person} {_pick(draw, DROPS)} the {thing}."
            world.take(person, thing)
            return f"{person} {_pick(draw, TAKES)} the {thing}."
    target = _pick(draw, ROOMS if room is None else _OTHER_ROOMS[room])
    world.move(person, target)
    return f"{person} {_pick(draw, MOVES)} the {target}."


_OTHER_ROOMS = {room: tuple(other for other in ROOMS if other != room) for room in ROOMS}


def _between(draw: Draw, low: int, high: int) -> int:
    return low + int(draw() * (high - low + 1))


def _pick(draw: Draw, items: list[str] | tuple[str, ...]) -> str:
    return items[int(draw() * len(items))]


def _some(draw: Draw, items: tuple[str, ...], count: int) -> list[str]:
    pool = list(items)
    return [pool.pop(int(draw() * len(pool))) for _ in range(count)]


# The questions: (world, draw) -> (question, all valid answers).


def _where(world: World, draw: Draw) -> tuple[str, list[str]]:
    person = _pick(draw, list(world.rooms))
    return f"Where is {person}?", [f"{person} is in the {world.rooms[person]}."]


def _everyone(world: World, draw: Draw) -> tuple[str, list[str]]:
    return "Where is everyone?", [", ".join(f"{person}: {world.rooms[person]}" for person in sorted(world.rooms)) + "."]


def _object(world: World, draw: Draw) -> tuple[str, list[str]]:
    thing = _pick(draw, list(world.places))
    return f"Where is the {thing}?", [f"The {thing} is in the {world.room_of(thing)}."]


def _has(world: World, draw: Draw) -> tuple[str, list[str]]:
    thing = _pick(draw, list(world.places))
    place = world.places[thing]
    return f"Who has the {thing}?", [f"{place if place in world.rooms else 'Nobody'} has the {thing}."]


def _yesno(world: World, draw: Draw) -> tuple[str, list[str]]:
    person = _pick(draw, list(world.rooms))
    room = world.rooms[person]
    if draw() < 0.5:
        return f"Is {person} in the {room}?", ["yes"]
    # A wrong room out of the same story where there is one; else "is the room named at all" would give the answer.
    named = sorted({other for seen in world.visited.values() for other in seen} - {room})
    return f"Is {person} in the {_pick(draw, named or _OTHER_ROOMS[room])}?", ["no"]


def _count(world: World, draw: Draw) -> tuple[str, list[str]]:
    # Draw the number first, then somebody it is true of: drawing the person first would make most answers "none".
    by_count: dict[str, list[str]] = {}
    for person in world.rooms:
        by_count.setdefault(COUNTS[len(world.carried(person))], []).append(person)
    answer = _pick(draw, list(by_count))
    return f"How many objects is {_pick(draw, by_count[answer])} carrying?", [answer]


def _visited(world: World, draw: Draw) -> tuple[str, list[str]]:
    # Somebody who has been in several rooms if there is one: several right answers are what this kind is for.
    several = [person for person, seen in world.visited.items() if len(seen) > 1]
    person = _pick(draw, several or list(world.visited))
    return f"Name a place where {person} was.", world.visited[person]


def _someone(world: World, draw: Draw) -> tuple[str, list[str]]:
    return "Say where somebody is.", [f"{person} is in the {room}." for person, room in world.rooms.items()]


def _event(world: World, draw: Draw) -> tuple[str, list[str]]:
    return "Say one thing that happened.", list(dict.fromkeys(world.told))


def _log(world: World, draw: Draw) -> tuple[str, list[str]]:
    return "Write the log.", [" ".join(world.log)]


_ASK: dict[str, Callable[[World, Draw], tuple[str, list[str]]]] = {
    "where": _where,
    "everyone": _everyone,
    "object": _object,
    "has": _has,
    "yesno": _yesno,
    "count": _count,
    "visited": _visited,
    "someone": _someone,
    "event": _event,
    "log": _log,
}

# The re-reader shares no state, table or function with the simulator above, so that either can show the other wrong.

_EVENT = re.compile(
    r"(?P<person>[A-Z]\w*) (?:(?P<move>went to|moved to|travelled to|journeyed to)"
    r"|(?P<take>picked up|took|grabbed)|(?P<drop>put down|dropped|left)) the (?P<noun>\w+)\."
)
_QUESTION = re.compile(
    r"Where is (?P<everyone>everyone)\?|Where is the (?P<object>\w+)\?|Where is (?P<where>\w+)\?"
    r"|Who has the (?P<has>\w+)\?|Is (?P<yesno>\w+) in the (?P<room>\w+)\?"
    r"|How many objects is (?P<count>\w+) carrying\?|Name a place where (?P<visited>\w+) was\."
    r"|Say where (?P<someone>somebody) is\.|Say one (?P<event>thing) that happened\.|Write the (?P<log>log)\."
)


def answer_from_text(context: str, question: str) -> set[str]:
    """Derive the valid answers from the words alone, by reading the context again.

    Args:
        context: Event sentences as `examples` writes them.
        question: Of one of ALL_KINDS.

    Returns:
        Every valid answer; empty if the context does not tell, as for a person it does not mention.

    Raises:
        ValueError: If a sentence or the question cannot be read.
    """
    walks: dict[str, list[str]] = {}
    holder: dict[str, str | None] = {}
    lies_in: dict[str, str] = {}
    entries: list[str] = []
    sentences = re.split(r"(?<=\.)\s+", context.strip())
    for sentence in sentences:
        event = _EVENT.fullmatch(sentence)
        if event is None:
            raise ValueError(f"context must be events such as 'Mary went to the kitchen.', got {sentence!r}")
        person, noun = event["person"], event["noun"]
        if event["move"]:
            walks.setdefault(person, []).append(noun)
            entries.append(f"{person}, {noun}: came in.")
        else:
            holder[noun] = person if event["take"] else None
            lies_in[noun] = walks[person][-1] if person in walks else ""
            entries.append(f"{person}, {lies_in[noun]}: {'took' if event['take'] else 'left'} {noun}.")
    asked = _QUESTION.fullmatch(question)
    if asked is None:
        raise ValueError(f"question must be one that the story world asks, got {question!r}")
    kind = next(name for name, value in asked.groupdict().items() if value is not None)
    name = asked[kind]
    if kind == "event":
        return set(sentences)
    if kind == "log":
        return {" ".join(entries)}
    if kind == "someone":
        return {f"{person} is in the {walk[-1]}." for person, walk in walks.items()}
    if kind == "everyone":
        return {", ".join(f"{person}: {walks[person][-1]}" for person in sorted(walks)) + "."} if walks else set()
    if name not in (holder if kind in ("object", "has") else walks):
        return set()
    if kind == "where":
        return {f"{name} is in the {walks[name][-1]}."}
    if kind == "object":
        carrier = holder[name]
        room = walks.get(carrier, [""])[-1] if carrier else lies_in[name]
        return {f"The {name} is in the {room}."} if room else set()
    if kind == "has":
        return {f"{holder[name] or 'Nobody'} has the {name}."}
    if kind == "yesno":
        return {"yes" if walks[name][-1] == asked["room"] else "no"}
    if kind == "count":
        number = sum(carrier == name for carrier in holder.values())
        return {("none", "one", "two", "three")[number]} if number <= 3 else set()
    return set(walks[name])
