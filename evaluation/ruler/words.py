"""Words, numbers and identifiers that examples are made of; every draw comes from the given generator."""

import random
import uuid
from collections.abc import Callable, Iterator
from typing import Literal

Kind = Literal["words", "numbers", "uuids", "short_numbers"]

_ADJECTIVES = """
able aged agile alert amber ample ancient angry apt arctic arid azure bald basic bitter black blank bleak blind
blond blue blunt bold bony brave brief bright brisk broad broken bronze brown bumpy busy calm careful cheap cheerful
chief chilly clean clear clever close cloudy coarse cold common cool copper cosy crimson crisp cruel curious curly
curved daily damp dark dead deaf dear decent deep dense dim dirty distant double drab dry dull dusty eager early
elder empty equal even exact faint fair faithful famous fancy fast fatal feeble fertile fierce final fine firm first
flat fluffy fond foreign formal fragile frank free fresh frosty full funny gentle giant gifted glad gloomy golden good
grand grave gray great green grim gross hairy handy happy hard harsh hasty heavy hollow holy honest hot huge humble
hungry icy ideal idle inner ivory jolly juicy keen kind large last late lazy lean light likely little lively lonely
long loose loud loyal lucky mad major mellow merry mild minor misty modern modest moist mossy muddy mute narrow nasty
neat new nimble noble noisy normal northern novel numb odd old olive open orange oval pale patient plain pleasant
plump polite poor pretty prime prompt proud pure purple quaint quick quiet rapid rare raw ready rich ripe robust rocky
rosy rotten rough round royal rude rural rusty sacred sad safe salty sandy scarce scarlet secret sharp short shy
silent silver simple single sleepy slim slow small smart smooth snowy sober soft solar solid sour southern spare
steady steep stern stiff still stormy strange strict strong sudden sunny super sweet swift tall tame tart tender thick
thin tidy tiny tired tough true ugly upper urban vague vast violet vivid warm wary weak wealthy weird wet white whole
wide wild windy wise wooden worthy yellow young
"""
_NOUNS = """
acorn actor agent alley anchor angle animal ankle answer apple apron arch arena arm army arrow artist ash aunt
author autumn award axe baby bacon badge bag baker balcony ball banana band bank barn barrel basin basket bath battle
beach bean bear beard beaver bed beetle bell belt bench berry bird biscuit blanket blossom board boat body bone book
boot border bottle bowl box brain branch bread breeze brick bridge broom brother brush bubble bucket bull bush butcher
butter button cabin cable cake camel camera camp canal candle canoe canyon cape captain car cargo carpet carrot cart
castle cattle cave ceiling cellar chain chair chalk channel cheese cherry chest chicken child chimney church circle
city clay cliff clock cloth cloud clover coach coal coast coat coin collar comet compass cook coral corner cotton
couch cousin cow cradle crane crayon creek cricket crow crown crystal cup curtain cushion dancer daughter deer desert
desk diamond dinner dish doctor dog doll dolphin donkey door dove dragon drawer dream dress drum duck duke eagle ear
earth echo editor egg elbow elephant elm engine envelope eye fabric face factory falcon family farmer feast feather
fence ferry fiddle field finger fire fish flag flame flock floor flour flower flute foam fog forest fork fountain fox
frame friend frog fruit garden garlic gate ghost giraffe glacier glass glove goat goose grain grape grass guest guitar
hammer hand harbor harp hat hawk heart hedge helmet heron hill honey hood hook horn horse hotel house hunter island
jacket jar jewel judge jungle kettle key king kitchen kite knee knife knight ladder lake lamb lamp lantern lawyer leaf
leather lemon letter library lily lion lizard lobster lock log magnet maple marble market mask meadow melon merchant
metal mill miner mirror monkey moon mountain mouse mouth museum mushroom nail neck needle nephew nest night nurse oak
oar ocean office onion orchard organ otter oven owl oyster paddle painter palace panda paper parade parrot path
peanut pear pebble pen pencil pepper piano picture pigeon pilot pine pipe pirate planet plate plum pocket poet pond
pony potato prince pumpkin puppy queen quilt rabbit raft rain raven ribbon rice ring river road robin rocket roof
room root rope rose sailor salad salmon sand scarf school scissors sea seed shadow shark sheep shelf shell shepherd
ship shirt shoe shovel sister skirt sky snail snake soap sock soldier soup spider spoon spring squirrel stable star
station statue stone storm stove straw stream street sugar summer sun swan sword table tailor teacher temple thread
throne thunder tiger toast tomato tower town train tree trumpet tulip tunnel turkey turtle uncle valley vase village
violin wagon walnut wall whale wheat wheel whistle window winter wizard wolf wool worker zebra
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


def distinct(kind: Kind, rng: random.Random) -> Iterator[str]:
    """Yield keys or values of a kind without end, no two the same."""
    seen: set[str] = set()
    draw = _DRAWS[kind]
    tries = 0
    while True:
        # A kind that is nearly used up goes on with longer ones.
        text = draw(rng, tries > 20)
        tries += 1
        if text not in seen:
            seen.add(text)
            tries = 0
            yield text


def _words(rng: random.Random, longer: bool) -> str:
    parts = [rng.choice(ADJECTIVES)] if longer else []
    return "-".join([*parts, rng.choice(ADJECTIVES), rng.choice(NOUNS)])


def _number(digits: int) -> Callable[[random.Random, bool], str]:
    def draw(rng: random.Random, longer: bool) -> str:
        size = digits + longer
        return str(rng.randrange(10 ** (size - 1), 10**size))

    return draw


def _uuid(rng: random.Random, longer: bool) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_DRAWS: dict[Kind, Callable[[random.Random, bool], str]] = {
    "words": _words,
    "numbers": _number(7),
    "short_numbers": _number(5),
    "uuids": _uuid,
}


def list_words(rng: random.Random) -> Iterator[str]:
    """Yield single words without hyphens, no two the same; compounds once the single ones are used up."""
    single = list(dict.fromkeys(ADJECTIVES + NOUNS))
    rng.shuffle(single)
    yield from single
    seen = set(single)
    while True:
        word = "".join(rng.choice(NOUNS) for _ in range(2 + (len(seen) > len(NOUNS) ** 2 // 2)))
        if word not in seen:
            seen.add(word)
            yield word
