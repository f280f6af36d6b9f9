"""The tables that a server keeps, the same in SQLite and PostgreSQL. `migrations/` makes and changes them."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()
HEAD = "0001"  # the newest of `migrations/versions`
_Big = BigInteger().with_variant(Integer, "sqlite")

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("prefix", String(16), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("is_admin", Boolean, nullable=False),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
)

# period: day, month or total; unit: micro_usd or tokens.
budgets = Table(
    "budgets",
    metadata,
    Column("key_id", String(32), ForeignKey("keys.id"), primary_key=True),
    Column("period", String(8), primary_key=True),
    Column("unit", String(16), primary_key=True),
    Column("amount", _Big, nullable=False),
)

# start: the day (2026-11-26), the month (2026-11) or "total", in UTC.
spending = Table(
    "spending",
    metadata,
    Column("key_id", String(32), ForeignKey("keys.id"), primary_key=True),
    Column("start", String(16), primary_key=True),
    Column("unit", String(16), primary_key=True),
    Column("settled", _Big, nullable=False, default=0),
    Column("reserved", _Big, nullable=False, default=0),
)

servers = Table(
    "servers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("started_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
)

# What a request may still spend; amounts: JSON [[start, unit, amount], ...].
reservations = Table(
    "reservations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(32), nullable=False),
    Column("server_id", String(32), nullable=False, index=True),
    Column("amounts", Text, nullable=False),
)

ledger = Table(
    "ledger",
    metadata,
    Column("id", _Big, primary_key=True, autoincrement=True),
    Column("kind", String(8), nullable=False),
    Column("at", Float, nullable=False, index=True),
    Column("model", String(200), nullable=False),
    Column("key_id", String(32), index=True),
    Column("request_id", String(64)),
    Column("prompt_tokens", _Big, nullable=False),
    Column("cached_tokens", _Big, nullable=False),
    Column("completion_tokens", _Big, nullable=False),
    Column("prefill_us", _Big, nullable=False),
    Column("decode_us", _Big, nullable=False),
    Column("micro_usd", _Big),
    UniqueConstraint("request_id", name="one_line_a_request"),
)

responses = Table(
    "responses",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(32)),
    Column("expires_at", Float, nullable=False, index=True),
    Column("body", Text, nullable=False),
    Column("messages", Text, nullable=False),  # the conversation up to its end
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(32)),
    Column("created_at", Float, nullable=False),
    Column("filename", String(400), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("content", LargeBinary, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(32)),
    Column("status", String(16), nullable=False, index=True),
    Column("server_id", String(32)),  # who works on it
    Column("body", Text, nullable=False),  # the object as clients see it
)

batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch_id", String(64), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("ok", Integer, nullable=False),
    Column("result", Text, nullable=False),
    Index("lines_of_a_batch", "batch_id"),
)
