"""A report read as a test wants it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a test wants to know of a page: ids, addresses, pictures, open tags, and its text."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "use", "wbr"})

    def __init__(self, path):
        super().__init__()
        self.ids, self.addresses, self.pictures, self.stack, self.words, self.drawings = [], [], [], [], [], 0
        self.scripts = 0
        self.html = path.read_text()
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in self.VOID:
            self.stack.append(tag)
        self.scripts += tag == "script"
        self.drawings += tag == "svg"
        if "id" in values:
            self.ids.append(values["id"])
        self.addresses += [values[key] for key in ("src", "href", "xlink:href", "action") if key in values]
        if tag == "img":
            self.pictures.append(values["src"])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.words.append(data)
