"""The Penn Treebank's tokens of captions, for where the Stanford tokenizer has no Java to run in.

Written from what that program, version 3.4.1 in lower case, gives for many texts. Captions have the same tokens from
both once the COCO evaluation has dropped punctuation. What differs before that: which way a quote turns, and that a
full stop after "Jr." at the end of a sentence stands once. Each line is looked at alone; the program also looks at how
the next one begins.
"""

import regex

# Words that keep their full stop: titles and units do anywhere; the second kind may also end a sentence; the third are
# words of another meaning unless they begin with a capital; the fourth stand before numbers.
_TITLES = (
  "adj|adm|adv|assoc|asst|atty|attys|ave|brig|capt|cf|cie|cmdr|col|comdr|cpl|dept|det|dr|drs|"
  "ens|ft|gen|gov|hon|insp|jos|lieut|lt|maj|messrs|mlle|mme|mr|mrs|ms|mt|natl|pfc|ph|pres|"
  "prof|pvt|rep|reps|res|rev|sen|sens|sfc|sgt|spc|st|ste|supt|vs|wm")
_ENDING = (
  "al|ala|apr|ariz|assn|aug|bhd|bldg|blvd|bros|calif|co|colo|conn|corp|cos|ct|dak|dec|esq|"
  "est|etc|ext|feb|fla|fri|ga|inc|ind|intl|jan|jr|jul|jun|kan|ky|ltd|mar|md|mich|minn|mo|"
  "mon|mont|neb|nev|nov|oct|okla|penn|plc|rd|rt|sep|sept|seq|sq|sr|sys|tel|tenn|thu|thurs|"
  "tue|tues|univ|va|vt|wed|wis|wisc|wyo")
_CAPITAL = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBERED = "art|ca|fig|figs|no|nos|op|pp|prop"
# Before these, a letter and a full stop are the end of a sentence.
_STARTING = (
  "a|about|according|additionally|after|an|as|at|but|earlier|he|her|here|however|if|in|it|last|"
  "many|more|now|once|one|other|our|she|since|so|some|such|that|the|their|then|there|these|"
  "they|this|we|what|when|while|yet|you")

_LETTER = r"[\p{L}\p{M}\u02c2-\u02c5\u02d2-\u02df]"
_ALNUM = r"[\p{L}\p{M}\p{Nd}\u02c2-\u02c5\u02d2-\u02df]"
_APOS = "['’]"
_AFTER = rf"{_APOS}(?:[smd]|ll|re|ve)(?!{_LETTER})"  # what a contraction ends with
_NAME = rf"[A-HJ-XZdlno]{_APOS}{_LETTER}{{2}}{_ALNUM}*"  # O'Neill, d'Amico
_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_IN_URL = r"""[^\s"<>|(){}]"""
_LAST = r"""[^\s"<>|(){}.!?,-]"""  # of an address: what follows it in a sentence is not part of it
_FILES = ("bat|bmp|c|cgi|class|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|"
          "tar|txt|wav|x|xml|zip")

# The longest match wins, and of equals the first. Where a rule has a group, the group is the token, and what else the
# rule matches only counts for the length.
_RULES = tuple(map(regex.compile, (
  # Contractions, and words that are two.
  rf"([A-Za-z]*[A-MO-Za-mo-z])[nN][{_APOS[1:-1]}`][tT]",
  rf"[nN][{_APOS[1:-1]}`][tT]",
  rf"(?i)([a-z]+){_AFTER}",
  rf"(?i){_AFTER}",
  rf"(?i)(can)not(?!{_ALNUM})",
  rf"(?i)(gon|wan)na(?!{_ALNUM})",
  rf"(?i)(got)ta(?!{_ALNUM})",
  rf"(?i)(lem|gim)me(?!{_ALNUM})",
  r"(?i)('t)(?:is|was)",
  # Words and numbers with letters.
  rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*",
  rf"[0-9]+{_ALNUM}*",
  # Apostrophes inside of words, and for what is left out.
  rf"{_NAME}(?:-{_ALNUM}+)*",
  rf"[A-Za-z]+[aeiouyAEIOUY]{_APOS}[aeiouA-Z][A-Za-z]*",
  rf"(?i)d{_APOS}ye|e{_APOS}er|c{_APOS}(?:mon|est)|(?:ol|[ldj]|somethin|dunkin){_APOS}|y{_APOS}(?={_ALNUM})",
  rf"(?i){_APOS}n{_APOS}|{_APOS}n(?!{_ALNUM})|{_APOS}(?:em|cause|till?)",
  rf"{_APOS}[2-9]0[sS]|{_APOS}[0-9][0-9](?!\S)",
  # Full stops that belong to a word.
  rf"(?i)(?:{_TITLES})\.",
  rf"(?i)((?:{_ENDING})\.)(?s:..)",
  rf"(?=[A-Z])((?i:{_CAPITAL})\.)(?s:..)",
  rf"(?i)((?:{_NUMBERED})\.) ?[0-9]",
  r"[mM](?:fg|tg)\.|[pP]t[ey]\.|(?i:ph\.d)\.",
  r"[A-Za-z](?:\.[A-Za-z])*\.",
  rf"([A-Za-z])\. (?=[A-Z])(?i:{_STARTING})\s",
  rf"((?:{_NAME}|{_ALNUM}+)(?:[-_](?:{_NAME}|{_ALNUM}+))*\.)[,;]",
  # Numbers, fractions, dates, telephone numbers.
  "[-+]?(?:[0-9]+(?:[.:,][0-9]+)*|(?:[.:,][0-9]+)+)",
  "(?:[0-9]{1,4}[- ])?[0-9]{1,4}[/⁄][0-9]{1,4}",
  "[0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4}",
  r"(?:\([0-9]{2,3}\) ?|(?:\+\+?)?(?:[0-9]{2,4}[- ])?[0-9]{2,4}[- ])[0-9]{3,4}[- ]?[0-9]{3,5}",
  r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
  # Words joined by hyphens, slashes and &.
  r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9]+))+",
  rf"{_ALNUM}+(?:[-_\u2010\u2011](?:{_NAME}|{_ALNUM}+))+",
  rf"{_PART}(?:\\?/{_PART}){{1,2}}",
  r"[A-Z]+(?:&[A-Z]+)+|[A-Z]{1,3}\$|[cC]\+\+|[cCfF]#",
  # Addresses, files, names and subjects of the web.
  rf"(?i)https?://{_IN_URL}+{_LAST}",
  rf"(?i)www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[a-z]{{2,4}}(?:/{_IN_URL}+{_LAST})?",
  rf"(?i)(?:(?:{_ALNUM}|&)+\.)+(?:com|net|org|edu)/{_IN_URL}+{_LAST}",
  r"[A-Za-z0-9][^\s\"<>|(){}@]*@[^\s\"<>|(){}]*[^\s\"<>|(){}\[\].,;:]",
  rf"(?i)[a-z0-9]+(?:\.[a-z0-9]+)*\.(?:{_FILES})(?![A-Za-z0-9])",
  rf"@[A-Za-z_][A-Za-z0-9_]*|#{_LETTER}+",
  # Tags, and faces.
  r"<[!?][A-Za-z-][^<>]*>|</[A-Za-z][^<>]*>|<[^\s@<>]+@[^\s@<>]+>",
  r"<[A-Za-z][\w.:-]*(?: +[A-Za-z][\w:.-]*(?: *= *(?:'[^']*'|\"[^\"]*\"|[A-Za-z0-9_]+))?)* */?>",
  r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])(?![A-Za-z0-9])",
  r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.-]?[-^x=~<>']\)",
  # Everything else, some of it in runs. What is not here has no token.
  r"&(?:#[0-9]+|[aeiou](?:acute|grave|uml)|HT|TL|UR|LR|QC|QL|QR|[co]dq);",
  r"[?!]+|--+|_+|\*+|#+|@+|<<|>>|``|''|\.\.\.+|[!-/:-@\[-`{-~]",
  r"(?![\u2010\u2011])[\p{S}\p{P}\p{No}\ue000\ue001]",
)))
_PLAIN = regex.compile(r"([A-Za-z]+)[ \n]")
_TWO = frozenset(("cannot", "gonna", "wanna", "gotta", "lemme", "gimme"))

# What the program cannot read: all beyond 16 bits, and punctuation that it does not know.
_UNREAD = regex.compile("[\U00010000-\U0010ffff\u2012\u2024\u2025\u2027\u203c\u203d\u2043\u2045-\u206f\u20d0-\u20ff"
                        "\ufe00-\ufe0f]")
_SOFT = regex.compile(rf"(?<={_ALNUM})\xad(?={_ALNUM})")
_ENTITIES = {"amp": "&", "lt": "\ue000", "gt": "\ue001", "quot": '"', "apos": "'", "nbsp": " ", "mdash": "—",
             "ndash": "—", "md": "—"}
_ENTITY = regex.compile(rf"&({'|'.join(_ENTITIES)});", regex.IGNORECASE)
_NAMES = {
  "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
  "£": "#", "€": "$", "¤": "$", "¢": "cents", "…": "...", "\ue000": "<", "\ue001": ">",
  **dict.fromkeys('“”«»"', "''"), **dict.fromkeys("‘’‛‹›", "'"), **dict.fromkeys(("–", "—", "―", "---", "----"), "--")}
_INSIDE = str.maketrans({"(": "-lrb-", ")": "-rrb-", " ": "\xa0"})
_STRAIGHT = regex.compile(rf"(?i)n{_APOS}t|{_AFTER}")


def tokenize(text: str) -> list[str]:
  """Returns the tokens of one line in lower case: brackets are "-lrb-"; what the program cannot read is left out."""
  text = _UNREAD.sub("\0", _SOFT.sub("", text))
  text = _ENTITY.sub(lambda m: _ENTITIES[m[1].lower()], text) + "\n\n"  # a rule looks so far ahead
  out, place = [], 0
  while place < len(text):
    if (plain := _PLAIN.match(text, place)) and plain[1].lower() not in _TWO:  # most words, at a fifth of the time
      out.append(plain[1].lower())
      place = plain.end()
    elif found := max((m for rule in _RULES if (m := rule.match(text, place))), key=regex.Match.end, default=None):
      token = found[found.re.groups]
      out.append(_name(token))
      place += len(token)
    else:
      place += 1
  return out


def _name(token: str) -> str:
  """Returns what a token is called, in lower case."""
  if token.startswith("..."):
    return "..."
  if token in _NAMES:
    return _NAMES[token]
  if token[0] == "<":
    return token.replace(" ", "\xa0").lower()
  if _STRAIGHT.fullmatch(token):
    token = token.replace("’", "'")
  return token.translate(_INSIDE).lower()
