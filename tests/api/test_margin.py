"""`halve margin` from a file, a ledger and a bundle."""

from decimal import Decimal
from pathlib import Path

import pytest

from halve.api.margin import compression_of, margin
from halve.core.certificate import Measured, Speed
from halve.core.errors import ConfigError, OutputError
from halve.economics.currency import read_currency
from halve.economics.ledger import LedgerEntry
from halve.server.store import Store

D = Decimal

EXAMPLE = Path(__file__).parents[2] / "examples" / "products" / "support-copilot.yaml"
YAML = """
price_per_seat: 30
seats: 400
requests_per_seat: 600
tokens: {prompt: 1200, cached: 0.3, answer: 220}
source:
  self_hosted: {input_usd_per_mtok: 0.1, output_usd_per_mtok: 0.8}
tenants:
  acme: {seats: 10}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "copilot.yaml"
    path.write_text(YAML)
    return path


def test_the_example_is_a_product(tmp_path):
    found = margin(EXAMPLE, report=tmp_path / "page.html", currencies=[read_currency("JPY=155.2@2026-11-20")])
    assert found.rows[0].statement.machines == 6
    assert found.rows[1].quality_loss == D("0.008")
    plain = found.to_plain()
    assert plain["currency"] == {"code": "JPY", "per_usd": 155.2, "as_of": "2026-11-20"}
    assert plain["scenarios"][0]["gross_margin"] == 0.714823333
    page = (tmp_path / "page.html").read_text()
    assert "¥9,312,000" in page
    assert "1 USD = 155.2 JPY, 2026-11-20" in page


def test_a_file_gives_its_name_and_its_digits(file):
    found = margin(file)
    assert found.product.name == "copilot"
    assert found.product.cached == D("0.3")
    assert found.rows[0].statement.token_usd == D("62.40")
    assert found.product.source.input_usd_per_mtok == D("0.1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seats: 1\nseats: 2\n", r"copilot\.yaml: line 2: 'seats' is there twice; keep one of them"),
        ("seats: [1\n", r"copilot\.yaml: not YAML: "),
        ("- 1\n", r"copilot\.yaml: a product is a page of `key: value` lines"),
        ("seats: !!python/object:os.system {}\n", r"copilot\.yaml: not YAML: could not determine a constructor"),
        ("seats: .inf\n", r"missing price_per_seat"),
        ("&a [*a]: 1\n", r"copilot\.yaml"),
        (YAML + "growht: {}\n", r"growht: unknown key; did you mean 'growth'\?"),
        (YAML.replace("seats: 400", "seats: .inf"), r"seats: '?\.inf"),
    ],
)
def test_files_that_are_none(file, text, said):
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        margin(file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: can't be read"):
        margin(tmp_path / "none.yaml")


def test_a_page_that_cannot_be_written(file, tmp_path):
    with pytest.raises(OutputError, match=r"page\.html: can't be written"):
        margin(file, report=tmp_path / "none" / "page.html")


def test_words_of_the_command_line_win_over_the_file(file):
    raw = {**margin_raw(), "api_price_cut": {"cut": "10%"}}
    assert margin(raw, api_cut="60%").product.api_cut.cut == D("0.6")
    with pytest.raises(ConfigError, match=r"--api-cut: '600%' must be from 0% to 100%"):
        margin(file, api_cut="600%")
    with pytest.raises(ConfigError, match=r"language: 'fr' must be en or ja"):
        margin(file, language="fr")


def margin_raw():
    return {
        "price_per_seat": 30,
        "seats": 400,
        "requests_per_seat": 600,
        "tokens": {"prompt": 1200, "answer": 220},
        "source": {"self_hosted": {"input_usd_per_mtok": "0.1", "output_usd_per_mtok": "0.8"}},
    }


# The ledger


def fill(path, *, unpriced=False):
    """A month of 30.42 days: acme uses 3 of 4 $, the machine idles for 6."""
    store = Store(f"sqlite:///{path}")
    acme, _ = store.add_key("acme")
    globex, _ = store.add_key("globex")
    start = 1_790_000_000.0
    lines = [(acme.id, 3_000_000, 0.0), (globex.id, None if unpriced else 1_000_000, 1000.0)]
    for i, (key, money, later) in enumerate(lines):
        entry = LedgerEntry(kind="request", at=start + later, model="base", key_id=key, request_id=f"r{i}",
                            prompt_tokens=900, completion_tokens=100, decode_us=1, micro_usd=money)  # fmt: skip
        store.settle(None, entry)
    store.settle(None, LedgerEntry(kind="idle", at=start + 730 * 3600, model="base", decode_us=5, micro_usd=6_000_000))
    return f"sqlite:///{path}"


def test_accounts_from_a_ledger(file, tmp_path):
    url = fill(tmp_path / "ledger.db")
    books = margin(file, ledger=url).books
    assert round(books.seconds) == 730 * 3600
    by = {account.name: account for account in books.tenants}
    assert by["acme"].token_usd == D("7.5")
    assert round(by["acme"].revenue_usd, 4) == 300
    assert by["globex"].revenue_usd is None
    assert books.total_micro_usd == 10_000_000
    assert [row["margin"] for row in margin(file, ledger=url).to_plain()["tenants"]] == [pytest.approx(0.975), None]


def test_a_stretch_of_the_ledger(file, tmp_path):
    url = fill(tmp_path / "ledger.db")
    books = margin(file, ledger=url, since="2026-09-21", until="2026-09-22").books
    assert books.seconds == 86400
    assert sum(account.requests for account in books.tenants) == 2
    assert books.total_micro_usd == 4_000_000


def test_unpriced_requests_are_not_free(file, tmp_path):
    books = margin(file, ledger=fill(tmp_path / "ledger.db", unpriced=True)).books
    assert {account.name: account.cost_known for account in books.tenants} == {"acme": True, "globex": False}


def test_ledgers_that_say_nothing(file, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no such file; halve serve --db writes one"):
        margin(file, ledger=f"sqlite:///{tmp_path / 'none.db'}")
    Store(f"sqlite:///{tmp_path / 'empty.db'}").all_keys()
    with pytest.raises(ConfigError, match=r"no request is in it since 2026-09-01; a margin needs some"):
        margin(file, ledger=f"sqlite:///{tmp_path / 'empty.db'}", since="2026-09-01")
    with pytest.raises(ConfigError, match=r"--since: it is of a ledger; give --ledger URL"):
        margin(file, since="2026-09-01")
    with pytest.raises(ConfigError, match=r"--until: 'soon' is not a day or time"):
        margin(file, ledger=f"sqlite:///{tmp_path / 'empty.db'}", until="soon")
    with pytest.raises(ConfigError, match=r"--since 2026-09-02: must be before --until 2026-09-01"):
        margin(file, ledger=f"sqlite:///{tmp_path / 'empty.db'}", since="2026-09-02", until="2026-09-01")


def test_a_tenant_written_wrong_is_named(file, tmp_path):
    file.write_text(YAML.replace("acme", "acmee"))
    with pytest.raises(ConfigError, match=r"tenants\.acmee: the ledger has no key of this name; did you mean 'acme'\?"):
        margin(file, ledger=fill(tmp_path / "ledger.db"))


# A bundle


class Certified:
    """The fields of a certificate that count here."""

    def __init__(self, prefill, decode, high, kl=0.0):
        self.speed = Speed(prefill_tok_s=self.of(prefill), decode_tok_s=self.of(decode))
        self.original_speed = Speed(prefill_tok_s=self.of(1000), decode_tok_s=self.of(1000))
        self.quality = type(
            "Quality",
            (),
            {
                "ppl_ratio": Measured(value=1.0, low=0.99, high=high, n=9),
                "kl_mean": Measured(value=0.0, low=0.0, high=kl, n=9),
            },
        )

    @staticmethod
    def of(value):
        return None if value is None else Measured(value=value, low=value, high=value, n=3)


def test_compression_as_a_certificate_has_it():
    certificate = Certified(1600, 2000, 1.004)
    machines = {"source": {"machines": {}}}
    assert compression_of(certificate, machines, "out/b") == {
        "prefill_speedup": D("1.6"), "decode_speedup": D("2.0"), "quality_loss": D("0.004"),
        "origin": "certificate of b",
    }  # fmt: skip
    priced = compression_of(certificate, {"source": {"self_hosted": {}}}, "b")
    assert priced["cost_ratio"] == D("0.625")
    assert compression_of(Certified(1, 1, 0.99), machines, "b")["quality_loss"] == 0
    assert compression_of(Certified(1, 1, 0.99, kl=0.01), machines, "b")["quality_loss"] == D("0.01005017")
    with pytest.raises(ConfigError, match=r"--bundle b: its certificate has no decode speed of both models"):
        compression_of(Certified(1600, None, 1.0), machines, "b")
