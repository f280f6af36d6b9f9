"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _big() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("revoked_at", sa.Float),
        sa.Column("is_admin", sa.Boolean, nullable=False),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("tokens_per_minute", sa.Integer),
    )
    op.create_table(
        "budgets",
        sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), primary_key=True),
        sa.Column("period", sa.String(8), primary_key=True),
        sa.Column("unit", sa.String(16), primary_key=True),
        sa.Column("amount", _big(), nullable=False),
    )
    op.create_table(
        "spending",
        sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), primary_key=True),
        sa.Column("start", sa.String(16), primary_key=True),
        sa.Column("unit", sa.String(16), primary_key=True),
        sa.Column("settled", _big(), nullable=False),
        sa.Column("reserved", _big(), nullable=False),
    )
    op.create_table(
        "servers",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("started_at", sa.Float, nullable=False),
        sa.Column("seen_at", sa.Float, nullable=False),
    )
    op.create_table(
        "reservations",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("server_id", sa.String(32), nullable=False, index=True),
        sa.Column("amounts", sa.Text, nullable=False),
    )
    op.create_table(
        "ledger",
        sa.Column("id", _big(), primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("at", sa.Float, nullable=False, index=True),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("key_id", sa.String(32), index=True),
        sa.Column("request_id", sa.String(64)),
        sa.Column("prompt_tokens", _big(), nullable=False),
        sa.Column("cached_tokens", _big(), nullable=False),
        sa.Column("completion_tokens", _big(), nullable=False),
        sa.Column("prefill_us", _big(), nullable=False),
        sa.Column("decode_us", _big(), nullable=False),
        sa.Column("micro_usd", _big()),
        sa.UniqueConstraint("request_id", name="one_line_a_request"),
    )
    op.create_table(
        "responses",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32)),
        sa.Column("expires_at", sa.Float, nullable=False, index=True),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("messages", sa.Text, nullable=False),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32)),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("filename", sa.String(400), nullable=False),
        sa.Column("purpose", sa.String(40), nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32)),
        sa.Column("status", sa.String(16), nullable=False, index=True),
        sa.Column("server_id", sa.String(32)),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "batch_lines",
        sa.Column("batch_id", sa.String(64), primary_key=True),
        sa.Column("line", sa.Integer, primary_key=True),
        sa.Column("ok", sa.Integer, nullable=False),
        sa.Column("result", sa.Text, nullable=False),
    )
    op.create_index("lines_of_a_batch", "batch_lines", ["batch_id"])


def downgrade() -> None:
    """Drop them."""
    for name in (
        "batch_lines", "batches", "files", "responses", "ledger", "reservations", "servers", "spending", "budgets",
        "keys",
    ):  # fmt: skip
        op.drop_table(name)
