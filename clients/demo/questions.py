"""The demo's questions: everyday requests for advice, one sentence each. None asks for a fact, since answers about
facts differ little in style.
"""

import random
from collections.abc import Iterator

TASKS = """boil an egg|clean a window|fold a shirt|water a cactus|sharpen a kitchen knife|remove a coffee stain
hang a picture|paint a wall|grow tomatoes on a balcony|bake a loaf of bread|make a paper boat|pack a small suitcase
write a thank-you note|choose a ripe melon|fix a squeaky door|learn to whistle|keep a plant alive in winter
cook rice without burning it|tie a scarf|save money on heating|wake up early|fall asleep faster|remember names
clean a bicycle chain|make a bed quickly|store fresh herbs|iron a pair of trousers|teach a dog to sit
plan a picnic|repair a torn book page|make lemonade|wash a woollen jumper|organise a small kitchen|polish shoes
unclog a sink|light a campfire|brew strong tea|carry heavy boxes safely|find a lost key|start a compost heap
wrap a large gift|dry wet boots|keep flowers fresh|read a paper map|learn ten words a day|cut an onion without tears
clean a wooden table|patch a bicycle tyre|sew on a button|plan a week of meals|choose a good pillow|stop a tap dripping
grow mushrooms at home|make a simple soup|remember a long number|train for a first long run|write a short speech
sleep well on a train|get wax out of a tablecloth|keep bread from going stale"""
FOODS = """fresh bread|soft cheese|ripe bananas|cooked rice|boiled potatoes|plain yoghurt|red lentils|smoked fish
roasted carrots|green apples|chickpeas|mushrooms|walnuts|spinach|honey|oat porridge|tomato soup|grilled chicken
eggs|pumpkin|beetroot|black beans|peanut butter|pears|leeks|sardines|sweet corn|cottage cheese|cauliflower|dried figs"""
OCCASIONS = """a rainy Sunday|a long train ride|a first day at work|a birthday at home|a cold winter evening
a walk in the woods|a day without electricity|a visit from old friends|a short lunch break|a camping weekend
a power cut|a school holiday|a quiet evening alone|a hot afternoon|a family dinner|a move to a new town
a job interview|a garden party|a day at the beach|a museum visit|a night in a tent|a flight with a toddler
a first cooking class|a school play|a chess evening|a ferry crossing|a flea market|a long walk in the rain
a weekend alone|a visit to the dentist|a street festival|a snow day|a morning of fishing|a picnic for ten
a long drive at night"""

TEMPLATES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (TASKS, ("How do I {}?", "What is the easiest way to {}?", "What do I need to {}?", "How can a child {}?")),
    (FOODS, ("What goes well with {}?", "What can I cook with {}?", "How should I store {}?")),
    (OCCASIONS, ("What should I bring for {}?", "How do I prepare for {}?", "How can I enjoy {}?")),
)


def questions(seed: int) -> list[str]:
    """Every question once, in an order that depends only on `seed`."""
    asked = list(_all())
    random.Random(seed).shuffle(asked)
    return asked


def _all() -> Iterator[str]:
    for topics, templates in TEMPLATES:
        for topic in topics.replace("\n", "|").split("|"):
            for template in templates:
                yield template.format(topic)
