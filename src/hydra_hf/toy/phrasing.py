"""How people ask for a picture: ten kinds of phrasing besides the plain caption, each with some that training never shows."""

from dataclasses import dataclass
from itertools import product


RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = {"fish": "fish"}


@dataclass(frozen=True)
class Phrasing:
    """One way of asking.

    Args:
        template: what is around the phrase.
        article: "right", or one of `ARTICLES`.
        has_plurals: "two dogs" rather than "two dog".
        has_digits: "2 dogs" rather than "two dogs", and "1 dog" for "a dog".
        relations: how each of `RELATIONS` is said.
        case: method of `str` that the text ends with.
    """

    template: str = "{}"
    article: str = "right"
    has_plurals: bool = True
    has_digits: bool = False
    relations: tuple[str, ...] = RELATIONS
    case: str = "lower"

    def one(self, name: str) -> str:
        """ "a cat"."""
        return f"1 {name}" if self.has_digits else ARTICLES[self.article](name)

    def several(self, count: int, name: str) -> str:
        """ "two cats"."""
        number = str(count) if self.has_digits else NUMBERS[count]
        return f"{number} {plural(name) if self.has_plurals else name}"

    def text(self, phrase: str) -> str:
        """What is typed."""
        return getattr(self.template.format(phrase), self.case)()


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    head, last = name.rpartition(" ")[0], name.rpartition(" ")[2]
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


ARTICLES = {
    "right": with_article,
    "swapped": lambda name: f"{'a' if name[0] in 'aeiou' else 'an'} {name}",
    "none": lambda name: name,
    "the": lambda name: f"the {name}",
    "one": lambda name: f"one {name}",
}


def _templates(*templates: str, **options) -> tuple[Phrasing, ...]:
    return tuple(Phrasing(template, **options) for template in templates)


def _relations(*forms: str) -> tuple[Phrasing, ...]:
    """Phrasings of `forms`, each four ways of saying `RELATIONS`, between commas."""
    return tuple(Phrasing(relations=tuple(form.split(", "))) for form in forms)


def _articles(*templates: str) -> tuple[Phrasing, ...]:
    slips = ("swapped", "none", "the", "one")
    return tuple(Phrasing(template, article=slip) for template, slip in product(templates, slips))


PLAIN = Phrasing()
# kind -> what training shows, what it does not; the single words of the latter occur in the former
PHRASINGS: dict[str, tuple[tuple[Phrasing, ...], tuple[Phrasing, ...]]] = {
    "photo": (
        _templates("a picture of {}", "a photo of {}", "an image of {}", "a photo with {}", "a picture showing {}",
                   "photo of {}", "the picture of {}", "a drawing of {}", "{} on a plain background"),
        _templates("an image with {}", "a photo showing {}", "picture of {}", "the photo of {}", "a drawing with {}"),
    ),
    "draw": (
        _templates("draw {}", "draw me {}", "show {}", "make {}", "paint me {}", "make a picture of {}",
                   "draw a picture of {}", "show me an image of {}"),
        _templates("show me {}", "paint {}", "make me {}", "draw me a picture of {}", "show me a photo of {}"),
    ),
    "please": (
        _templates("draw me {}, please", "please draw {}", "{} please", "draw {} please", "please show me {}",
                   "please make {}", "show {}, please"),
        _templates("draw {}, please", "please draw me {}", "{}, please", "make {} please", "please paint {}"),
    ),
    "request": (
        _templates("can you draw {}?", "could you make {}?", "i want {}", "i would like a picture of {}",
                   "can i have {}?", "i need a photo of {}", "would you paint me {}?", "i want to see {}",
                   "could you show me {}?"),
        _templates("can you make {}?", "could you draw me {}?", "i would like {}", "i want a picture of {}",
                   "can i have a photo of {}?", "i would like to see {}"),
    ),
    "capitals": (
        (*_templates("{}", "draw {}", case="upper"), *_templates("{}", "a picture of {}", case="title"),
         *_templates("{}", case="capitalize")),
        (*_templates("a photo of {}", "paint {}", case="upper"), *_templates("draw {}", case="title"),
         *_templates("an image of {}", case="capitalize")),
    ),
    "article": (
        _articles("{}", "draw {}", "a photo of {}"),
        _articles("a picture of {}", "show me {}", "{} please"),
    ),
    "plural": (
        _templates("{}", "draw {}", "a photo of {}", has_plurals=False),
        _templates("a picture of {}", "show me {}", "{} please", has_plurals=False),
    ),
    "punctuation": (
        _templates("{}.", "{}!", "{}!!!", "{} ?", "draw {}.", "{},", '"{}"', "{}...", "a photo of {}."),
        _templates("{} .", "{}?", "draw {}!", "a picture of {}.", 'draw "{}"', "a photo of {}..."),
    ),
    "relation": (
        _relations("on the left of, on the right of, over, under",
                   "at the left of, at the right of, on top of, beneath",
                   "to the left side of, to the right side of, directly over, directly below",
                   "directly left of, directly right of, right above, right below",
                   "a bit left of, a bit right of, a bit above, a bit under",
                   "on the left hand side of, on the right hand side of, up above, down below",
                   "somewhere to the left side of, somewhere to the right side of, at the top of, at the bottom of",
                   "off to the left of, off to the right of, on the upper side of, on the bottom of"),
        _relations("to the left of, to the right of, directly above, directly under",
                   "on the left side of, on the right side of, on the top of, directly beneath"),
    ),
    "digits": (
        _templates("{}", "draw {}", "a photo of {}", has_digits=True),
        _templates("a picture of {}", "show me {}", "{} please", has_digits=True),
    ),
}  # fmt: skip
KINDS = ("plain", *PHRASINGS)
ONLY_OF = {"relation": ("position",), "plural": ("counting",)}  # kinds that say something of some categories alone


def fits(kind: str, category: str) -> bool:
    """Whether a kind of phrasing differs from the plain one in a category of prompts."""
    return category in ONLY_OF.get(kind, (category,))


def phrasings_of(kind: str, split: str) -> tuple[Phrasing, ...]:
    """What a split says of a kind; the plain caption has one form for both. ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"{kind=} of phrasing must be one of {KINDS}.")
    return (PLAIN,) if kind == "plain" else PHRASINGS[kind][split == "test"]
