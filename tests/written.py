"""What a report leaves, checked without a browser: audit.json by its schema, a page by its tags, names, links and size."""

import html.parser
import json
from importlib import resources

import jsonschema

VOID = {"meta", "link", "img", "br", "hr", "input"}
LARGEST = 2e6  # bytes of a page

_ROOM = resources.files("gdiff_jax.auditing")
SCHEMA, COMPARISON = (
    json.loads((_ROOM / place).read_text(encoding="utf-8")) for place in ("audit.schema.json", "comparing/compare.schema.json")
)


def faults_of_json(text, schema=SCHEMA):
    """Where an audit.json is not as its schema says; [] where it is. JSON knows no NaN, which Python writes and reads."""

    def no_number(name):
        raise ValueError(f"{name} is no JSON")

    data, validator = json.loads(text, parse_constant=no_number), jsonschema.Draft202012Validator(schema)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in validator.iter_errors(data)]


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.faults = [], [], [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if len(named) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named[name] for name in ("href", "src") if name in named]
        if tag == "img" and not named.get("alt"):
            self.faults.append("a picture without words")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at line {self.getpos()[0]} closes another element")


def faults_of_page(text):
    """What is wrong with a page: elements that are not closed in their order, a name twice, a link to nowhere, its size."""
    page = _Page()
    page.feed(text)
    page.close()
    found = [*page.faults, *[f"<{tag}> is not closed" for tag in page.open]]
    found += [f"id {name!r} twice" for name in set(page.ids) if page.ids.count(name) > 1]
    inside = {f"#{name}" for name in page.ids}
    found += [f"link to {link[:40]!r}" for link in page.links if not link.startswith("data:") and link not in inside]
    size = len(text.encode())
    return found + ([f"{size} bytes"] if size > LARGEST else [])
