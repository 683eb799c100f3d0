"""The words of generated texts: adjectives, nouns and sentences of noise. No word is part of another, so a word that is
found in an answer is not a part of another word."""

import numpy as np

_ADJECTIVES = """
    ample amused ancient arctic arid astute awake baffled bashful blunt bold brave brisk calm candid careful
    cheerful chilly civil classic clumsy coarse cosmic cozy crafty crisp curious daring dazzling decent dense devout
    dizzy docile dusty eager earnest elastic elegant exotic faint fancy feeble fertile fickle fierce filthy fluffy
    foggy fragile frantic fresh frosty frugal fuzzy gaudy gentle giddy glad gloomy glossy graceful grim groovy gullible
    hardy hasty hazy hefty hollow honest humble husky idle jolly jumpy keen lavish lazy lively lofty lonely loyal
    lucid lush meek mellow merry mighty minty modest moody muddy mute mystic naive narrow nasty neat nimble noble noisy
    numb oblong opaque ornate pale patient placid plump polite prickly prompt pungent puzzled quaint quirky rapid rare
    reckless regal ripe robust rowdy rugged rustic sacred salty scarce secret serene shabby sharp shiny shrill silent
    sincere sleek sleepy slender sloppy smug sober solemn spicy spry stale steep stiff stout strict sturdy subtle sullen
    supple swift tame tangy tender tense thirsty tidy timid tiny tranquil tricky upbeat urban vague valiant vast velvety
    vivid wacky wary weary whole wicked wild witty worldly zany zealous"""
_NOUNS = """
    abbey acorn album almond anchor anthem apron atlas aviary avocado badge bagel balcony ballad bamboo
    banjo banner barley basil beacon beaver beetle bicycle biscuit blanket blender blossom bonfire bonnet bracelet brick
    brook broom bubble buckle buffalo bugle cabin cactus camel canal canoe canyon caravan carrot castle cathedral
    cello chalk chapel chariot cheese chimney chisel cinema cinnamon citadel clarinet cliff cobweb coffee comet compass
    cottage cradle crayon creek cricket crystal cupboard cushion cymbal daisy dentist desert diary dolphin donkey
    dragon drawer dungeon eagle easel eclipse elbow elephant emerald engine envelope estuary fabric falcon faucet feather
    fiddle flute fjord flannel flask folder forest fossil fountain freckle fridge furnace galaxy gallery garlic gazebo
    geyser giraffe glacier glove goblet gondola gorilla granite guitar hammock hamster harbor hedge helmet heron
    hinge hobby hockey hurdle iceberg igloo iguana ink insect island jacket jaguar jasmine jigsaw journal jungle
    kayak kennel kettle kiosk kitten koala laborer lagoon lantern lasso lattice laundry lawn lemonade leopard lever library
    lighthouse lizard lobster locket lotus magnet magpie mammoth mandolin mango marble market meadow medal melon
    meteor mineral mirage mitten monsoon moose mosaic motor muffin museum mustard napkin nebula necklace needle nickel
    notebook novel nugget oasis oatmeal ocean octopus omelet orchard orchid organ ostrich otter oven oyster paddle
    pagoda palace pancake panther papaya parcel parrot pasture pebble pelican pencil penguin pepper piano pickle
    pigeon pillow pirate pistachio planet plaza pocket pony poodle poppy porcupine postcard potato prairie puddle
    pulley pumpkin puppet pyramid python quarry quill quilt raccoon radish ranch raven reef ribbon rocket
    rooster ruler saddle saffron salmon sandal satchel saxophone scarf school scooter sculptor seagull shovel shrimp
    shuttle siren skateboard sketch skillet sleigh snail snowflake sofa sparrow spider spinach sponge squirrel stadium
    stapler statue stencil stirrup stove submarine sultan summit sunset swan syrup tablet tambourine tavern teapot
    telescope temple tent terrace thimble thunder tiger toaster tomato torch tornado tractor trailer treasure
    trombone trophy trumpet tulip tunnel turbine turnip turtle umbrella unicorn vacuum valley vanilla vase
    village vineyard violin volcano waffle wagon walnut walrus waterfall whale whistle widget wigwam willow windmill wizard
    wombat xylophone yacht yogurt zebra zeppelin zipper"""
ADJECTIVES, NOUNS = (tuple(words.split()) for words in (_ADJECTIVES, _NOUNS))
# Noise repeats these sentences, which have no information that a task asks for.
NOISE = "The river is wide. The stone is grey. The bread is warm. On we walk. Out and home again."


def compound(number: int) -> str:
    """Returns the "adjective-noun" of a number below `COMPOUNDS`."""
    return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"


COMPOUNDS = len(ADJECTIVES) * len(NOUNS)


def word_order(rng: np.random.Generator, common: int, others: int) -> tuple[list[str], list[str]]:
    """Draws `common` words and at most `others` other words, all different.

    Single words come first, then pairs of nouns written as one word, in which no common word is a part.
    """
    words = ADJECTIVES + NOUNS
    order = [words[i] for i in rng.permutation(len(words))]
    nouns = [noun for noun in NOUNS if noun not in order[:common]]
    pairs = rng.permutation(len(nouns) ** 2)[: max(0, common + others - len(order))]
    double = [nouns[pair // len(nouns)] + nouns[pair % len(nouns)] for pair in pairs]
    return order[:common], (order[common:] + double)[:others]
