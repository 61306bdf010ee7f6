"""The phrasebook: parallel sentences in six languages from templates, word lists and CLDR.

`phrasebook/*.toml` hold the templates and word lists; weekdays, months, dates, countries, languages and
currencies come from CLDR through Babel. A sentence is a template with every slot filled, the same item in
each language. A template's sentences are cut into training and test by the text itself, so that no test
sentence stands in the training set in any language; a tenth of the templates is left out of training
altogether (the hard set).
"""

from __future__ import annotations

import hashlib
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

from babel import Locale
from babel.dates import format_skeleton
from babel.numbers import get_currency_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LANGUAGES = ("en", "zh", "de", "es", "fr", "it")
"""Codes of the languages, as in Whisper's tokens."""

PHRASEBOOK = Path(__file__).parent / "phrasebook"
_SLOT = re.compile(r"\{([a-z]+)\d?(?:\.([a-z]+))?\}")
_SLOT_NAME = re.compile(r"\{([a-z]+\d?)(?:\.[a-z]+)?\}")

Form = str | Mapping[str, str]
Item = Mapping[str, Form]  # language -> text, or named forms of it


@dataclass(frozen=True)
class Sentence:
    """One sentence in all languages, and the template it came from."""

    template: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Template:
    """A sentence with slots, in all languages."""

    id: str
    texts: Mapping[str, str]

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots, a trailing digit included, in the order of the English text."""
        return tuple(dict.fromkeys(_SLOT_NAME.findall(self.texts["en"])))


class Phrasebook:
    """Templates and word lists; `sentences` draws parallel sentences from them."""

    def __init__(self, templates: Sequence[Template], lexicon: Mapping[str, Sequence[Item]]):
        self.templates = tuple(templates)
        self.lexicon = lexicon
        for template in self.templates:
            _check(template, lexicon)

    @classmethod
    def load(cls, folder: Path = PHRASEBOOK) -> Phrasebook:
        """Reads every `*.toml` of a folder and adds the CLDR lists; ValueError names what is malformed."""
        lexicon = cldr_lexicon()
        templates: list[Template] = []
        for file in sorted(folder.glob("*.toml")):
            data = tomllib.loads(file.read_text("utf-8"))
            twice = lexicon.keys() & data["lexicon"].keys()
            if twice:
                raise ValueError(f"{file.name}: lists defined twice: {sorted(twice)}")
            lexicon |= data["lexicon"]
            templates += [
                Template(entry["id"], {code: entry[code] for code in LANGUAGES}) for entry in data["template"]
            ]
        return cls(templates, lexicon)

    def sentences(self, template: Template, count: int, rng: random.Random) -> list[Sentence]:
        """Up to `count` distinct sentences of a template."""
        found: dict[str, Sentence] = {}
        for _ in range(3 * count):
            sentence = self._fill(template, rng)
            found.setdefault(sentence.texts["en"], sentence)
            if len(found) == count or not template.slots:
                break
        return list(found.values())

    def _fill(self, template: Template, rng: random.Random) -> Sentence:
        items: dict[str, Item] = {}
        for slot in template.slots:
            # A second slot of the same list takes a different item.
            choices = [item for item in self.lexicon[slot.rstrip("0123456789")] if item not in items.values()]
            items[slot] = rng.choice(choices)
        return Sentence(
            template.id,
            {code: _fill_text(text, code, items) for code, text in template.texts.items()},
        )


@dataclass(frozen=True)
class Split:
    """Training and test sentences: `unseen` are new sentences of known templates, `hard` of new templates."""

    train: tuple[Sentence, ...]
    unseen: tuple[Sentence, ...]
    hard: tuple[Sentence, ...]


def split(book: Phrasebook, per_template: int = 250, test: int = 30, seed: int = 0) -> Split:
    """Draws the corpus and cuts it; deterministic in `seed`.

    `per_template`: sentences drawn of each training template, at most; `test`: sentences in each test set.
    """
    rng = random.Random(seed)
    ordered = sorted(book.templates, key=lambda template: _digest(template.id))
    hard_templates, templates = ordered[: len(ordered) // 10], ordered[len(ordered) // 10 :]
    drawn = {template.id: book.sentences(template, per_template, rng) for template in templates}
    # One sentence from each of `test` templates that have several.
    several = [template.id for template in templates if len(drawn[template.id]) >= 8]
    unseen = [rng.choice(drawn[name]) for name in several[:test]]
    taken = {text for sentence in unseen for text in sentence.texts.values()}
    train = [
        sentence
        for sentences in drawn.values()
        for sentence in sentences
        if taken.isdisjoint(sentence.texts.values())
    ]
    known = {text for sentence in train for text in sentence.texts.values()}
    wordings = {text for template in templates for text in template.texts.values()}
    hard_drawn = [
        # Two templates may say the same in one of the languages.
        [each for each in sentences if known.isdisjoint(each.texts.values())]
        if wordings.isdisjoint(template.texts.values())
        else []
        for template, sentences in [(t, book.sentences(t, test, rng)) for t in hard_templates]
    ]
    hard = list(_round_robin(hard_drawn, test))
    rng.shuffle(train)
    return Split(tuple(train), tuple(unseen), tuple(hard))


def cldr_lexicon() -> dict[str, Sequence[Item]]:
    """The built-in lists: weekday, month, date, time, count, number, price, country, language, city."""
    locales = {code: Locale.parse("zh_Hans" if code == "zh" else code) for code in LANGUAGES}
    days = [date(2024, 1, 1 + i) for i in range(7)]  # a Monday first
    on_day = {"en": "on {}", "de": "am {}", "es": "el {}", "fr": "{}", "it": "{}", "zh": "{}"}
    in_month = {"en": "in {}", "de": "im {}", "es": "en {}", "fr": "en {}", "it": "a {}", "zh": "{}"}
    on_date = {"en": "on {}", "de": "am {}", "es": "el {}", "fr": "le {}", "it": "il {}", "zh": "{}"}
    at_time = {
        "en": "at {0}:{1}",
        "de": "um {0}:{1} Uhr",
        "es": "a las {0}:{1}",
        "fr": "à {0} h {1}",
        "it": "alle {0}:{1}",
        "zh": "{0}点{1}分",
    }

    def name(code: str, day: date, width: str) -> str:
        names = locales[code].days if width == "day" else locales[code].months
        index = day.weekday() if width == "day" else day.month
        return names["format"]["wide"][index]

    return {
        "weekday": [{c: {"on": on_day[c].format(name(c, d, "day"))} for c in LANGUAGES} for d in days],
        "month": [
            {c: {"in": in_month[c].format(name(c, date(2024, m, 1), "month"))} for c in LANGUAGES}
            for m in range(1, 13)
        ],
        "date": [
            {
                c: {"on": on_date[c].format(format_skeleton("MMMMd", date(2024, m, d), locale=locales[c]))}
                for c in LANGUAGES
            }
            for m in range(1, 13)
            for d in range(2, 29)  # the 1st is irregular in French
            if d not in (8, 11)  # Italian elides before these: l'8, l'11
        ],
        "time": [
            {c: {"at": at_time[c].format(h, m)} for c in LANGUAGES}
            for h in (*range(2, 13), *range(14, 23))
            for m in (10, 15, 20, 30, 40, 45, 50)
        ],
        "count": [dict(zip(LANGUAGES, words, strict=True)) for words in _COUNTS],
        "number": [{c: str(n) for c in LANGUAGES} for n in range(11, 100)],
        "price": [
            {c: _price(c, n, currency, locales[c]) for c in LANGUAGES}
            for currency in ("EUR", "USD", "GBP", "CHF")
            for n in (*range(2, 21), *range(25, 100, 5))
        ],
        "country": [_country(code, row, locales) for code, row in _COUNTRIES.items()],
        "language": [{c: _lower(c, locales[c].languages[tag]) for c in LANGUAGES} for tag in _LANGUAGE_TAGS],
        "city": [dict(zip(LANGUAGES, names, strict=True)) for names in _CITIES],
    }


# fmt: off
_COUNTS = (  # en, zh, de, es, fr, it
    ("two", "两", "zwei", "dos", "deux", "due"), ("three", "三", "drei", "tres", "trois", "tre"),
    ("four", "四", "vier", "cuatro", "quatre", "quattro"), ("five", "五", "fünf", "cinco", "cinq", "cinque"),
    ("six", "六", "sechs", "seis", "six", "sei"), ("seven", "七", "sieben", "siete", "sept", "sette"),
    ("eight", "八", "acht", "ocho", "huit", "otto"), ("nine", "九", "neun", "nueve", "neuf", "nove"),
    ("ten", "十", "zehn", "diez", "dix", "dieci"),
)
_CITIES = (  # en, zh, de, es, fr, it; names that begin with a consonant, so that no preposition elides
    ("Berlin", "柏林", "Berlin", "Berlín", "Berlin", "Berlino"),
    ("Paris", "巴黎", "Paris", "París", "Paris", "Parigi"),
    ("London", "伦敦", "London", "Londres", "Londres", "Londra"),
    ("Madrid", "马德里", "Madrid", "Madrid", "Madrid", "Madrid"),
    ("Rome", "罗马", "Rom", "Roma", "Rome", "Roma"),
    ("Beijing", "北京", "Peking", "Pekín", "Pékin", "Pechino"),
    ("Vienna", "维也纳", "Wien", "Viena", "Vienne", "Vienna"),
    ("Munich", "慕尼黑", "München", "Múnich", "Munich", "Monaco di Baviera"),
    ("Geneva", "日内瓦", "Genf", "Ginebra", "Genève", "Ginevra"),
    ("Barcelona", "巴塞罗那", "Barcelona", "Barcelona", "Barcelone", "Barcellona"),
    ("Milan", "米兰", "Mailand", "Milán", "Milan", "Milano"),
    ("Shanghai", "上海", "Shanghai", "Shanghái", "Shanghai", "Shanghai"),
    ("Lisbon", "里斯本", "Lissabon", "Lisboa", "Lisbonne", "Lisbona"),
    ("Brussels", "布鲁塞尔", "Brüssel", "Bruselas", "Bruxelles", "Bruxelles"),
    ("Prague", "布拉格", "Prag", "Praga", "Prague", "Praga"),
    ("Tokyo", "东京", "Tokio", "Tokio", "Tokyo", "Tokyo"),
)
_COUNTRIES = {  # gender in French and Italian; all elide before a vowel
    "DE": "ff", "FR": "ff", "ES": "ff", "IT": "ff", "CN": "ff", "JP": "mm", "PT": "mm", "PL": "ff",
    "SE": "ff", "NO": "ff", "GR": "ff", "BE": "mm", "CA": "mm", "MX": "mm", "BR": "mm", "AU": "ff",
    "AT": "ff", "DK": "mf", "FI": "ff", "HU": "ff", "RU": "ff", "EG": "fm",
}
_LANGUAGE_TAGS = (
    "de", "en", "fr", "it", "es", "zh", "ja", "pt", "ru", "pl", "sv", "nl", "tr", "el", "ko", "ar",
)
# fmt: on
_COUNTRY_FORMS = {
    "fr-m": {"the": "le {}", "in": "au {}", "to": "au {}", "from": "du {}"},
    "fr-f": {"the": "la {}", "in": "en {}", "to": "en {}", "from": "de {}"},
    "fr-v": {"the": "l'{}", "in": "en {}", "to": "en {}", "from": "d'{}"},
    "it-m": {"the": "il {}", "in": "in {}", "to": "in {}", "from": "dal {}"},
    "it-f": {"the": "la {}", "in": "in {}", "to": "in {}", "from": "dalla {}"},
    "it-v": {"the": "l'{}", "in": "in {}", "to": "in {}", "from": "dall'{}"},
    "en": {"the": "{}", "in": "in {}", "to": "to {}", "from": "from {}"},
    "de": {"the": "{}", "in": "in {}", "to": "nach {}", "from": "aus {}"},
    "es": {"the": "{}", "in": "en {}", "to": "a {}", "from": "de {}"},
    "zh": {"the": "{}", "in": "{}", "to": "{}", "from": "{}"},
}


def _country(code: str, genders: str, locales: Mapping[str, Locale]) -> Item:
    gender = dict(zip(("fr", "it"), genders, strict=True))
    item: dict[str, Form] = {}
    for language, locale in locales.items():
        name = locale.territories[code]
        key = language
        if language in gender:
            key += "-v" if name[0] in "AEIOUÉ" else f"-{gender[language]}"
        item[language] = {form: text.format(name) for form, text in _COUNTRY_FORMS[key].items()}
    return item


def _price(code: str, amount: int, currency: str, locale: Locale) -> str:
    name = get_currency_name(currency, count=amount, locale=locale)
    return f"{amount}{name}" if code == "zh" else f"{amount} {name}"


def _lower(code: str, name: str) -> str:
    return name if code in ("en", "de", "zh") else name.lower()


def _fill_text(text: str, code: str, items: Mapping[str, Item]) -> str:
    def value(match: re.Match[str]) -> str:
        slot = match.group(0)[1:-1].split(".")[0]
        form = items[slot][code]
        return form if isinstance(form, str) else form[match.group(2)]

    filled = _SLOT.sub(value, text)
    start = next((i for i, char in enumerate(filled) if char.isalpha()), 0)  # past ¿ and ¡
    return filled[:start] + filled[start].upper() + filled[start + 1 :]


def _check(template: Template, lexicon: Mapping[str, Sequence[Item]]) -> None:
    for code, text in template.texts.items():
        if set(_SLOT_NAME.findall(text)) != set(template.slots):
            raise ValueError(f"template {template.id}: the {code} text has other slots than the English one")
        for name, form in _SLOT.findall(text):
            if name not in lexicon:
                raise ValueError(f"template {template.id}: no list named {name!r}")
            for item in lexicon[name]:
                if not isinstance(item[code], str) and form not in item[code]:
                    raise ValueError(
                        f"template {template.id}: an item of {name!r} has no {code} form {form!r}"
                    )


def _round_robin(groups: Sequence[Sequence[Sentence]], count: int) -> Iterator[Sentence]:
    taken = 0
    for i in range(max(map(len, groups), default=0)):
        for group in groups:
            if i < len(group) and taken < count:
                taken += 1
                yield group[i]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
