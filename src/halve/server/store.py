"""What a server keeps: keys and budgets, the ledger, responses, answers of batches.

Every method is one transaction. Whatever money or quota it changes is changed by one statement whose condition is
checked by the database, so that any number of servers may share it.
"""

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from halve.core.errors import ConfigError
from halve.economics.ledger import LedgerEntry
from halve.economics.tenants import Use
from halve.server import tables as t
from halve.server.database import Database, insert, upsert

Period = Literal["day", "month", "total"]
Unit = Literal["micro_usd", "tokens"]
DEAD_AFTER = 60.0  # seconds without a sign of life


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A key as its owner sees it; the secret is stored as its SHA-256 alone. is_admin: it sees the sums of all keys."""

    id: str
    name: str
    prefix: str
    created_at: float
    revoked_at: float | None
    is_admin: bool
    requests_per_minute: int | None
    tokens_per_minute: int | None


_SUMMED = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "micro_usd", "unpriced")


@dataclass(frozen=True, kw_only=True, slots=True)
class Uses:
    """The ledger between start and end, by key and model, and idle time. None: there is no line."""

    uses: tuple[Use, ...]
    idle_micro_usd: int
    start: float | None
    end: float | None


class OverBudgetError(Exception):
    """What a request may spend is more than its key has left."""

    def __init__(self, period: str, unit: str, amount: int, left: int) -> None:
        super().__init__(f"the budget of this key a {period} is {amount} {unit}, and {max(0, left)} are left")


class Store(Database):
    """url: `sqlite:///path` or `postgresql://...`. Raises OutputError, ConfigError."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.server_id = secrets.token_hex(8)

    # Life of servers

    def hello(self) -> None:
        """Say that this server lives, and take back what dead ones had reserved."""
        now = time.time()
        with self.writing() as c:
            row = {"id": self.server_id, "started_at": now, "seen_at": now}
            c.execute(upsert(c, t.servers, row, ["id"], {"seen_at": now}))
            dead = sa.select(t.servers.c.id).where(t.servers.c.seen_at < now - DEAD_AFTER)
            lost = c.execute(
                sa.select(t.reservations).where(
                    t.reservations.c.server_id.in_(dead) | t.reservations.c.server_id.not_in(sa.select(t.servers.c.id))
                )
            ).all()
            for row_ in lost:
                _release(c, row_)
            c.execute(sa.update(t.batches).where(t.batches.c.server_id.in_(dead)).values(server_id=None))
            c.execute(sa.delete(t.servers).where(t.servers.c.seen_at < now - DEAD_AFTER))

    def goodbye(self) -> None:
        """Say that this server ends; what it had reserved is free."""
        with self.writing() as c:
            for row in c.execute(sa.select(t.reservations).where(t.reservations.c.server_id == self.server_id)).all():
                _release(c, row)
            c.execute(sa.update(t.batches).where(t.batches.c.server_id == self.server_id).values(server_id=None))
            c.execute(sa.delete(t.servers).where(t.servers.c.id == self.server_id))

    # Keys

    def add_key(
        self,
        name: str,
        *,
        is_admin: bool = False,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[Key, str]:
        """A new key, and its secret, which nobody can read again."""
        if not 0 < len(name) <= 200:
            raise ConfigError(f"name: {name!r:.80} must have 1 to 200 characters")
        for what, value in (("requests", requests_per_minute), ("tokens", tokens_per_minute)):
            if value is not None and value < 1:
                raise ConfigError(f"{what} per minute: {value} must be 1 or more; leave it out for no limit")
        secret = "hk-" + secrets.token_urlsafe(32)
        row = {
            "id": secrets.token_hex(8),
            "name": name,
            "prefix": secret[:8],
            "sha256": _digest(secret),
            "created_at": time.time(),
            "is_admin": is_admin,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        }
        with self.writing() as c:
            c.execute(sa.insert(t.keys).values(**row))
        return self.key(str(row["id"])), secret

    def import_secret(self, name: str, secret: str) -> None:
        """Take a key from a file; one that is there already stays as it is."""
        row = {
            "id": secrets.token_hex(8),
            "name": name,
            "prefix": secret[:8],
            "sha256": _digest(secret),
            "created_at": time.time(),
            "is_admin": False,
        }
        with self.writing() as c:
            c.execute(insert(c, t.keys).values(**row).on_conflict_do_nothing())

    def key(self, id_or_name: str) -> Key:
        """One key. Raises ConfigError where none or several are called so."""
        found = [key for key in self.all_keys() if id_or_name in (key.id, key.name, key.prefix)]
        if len(found) != 1:
            raise ConfigError(
                f"key {id_or_name!r}: {'several have this name; use the id' if found else 'there is none'}; "
                "`halve keys list` shows them"
            )
        return found[0]

    def all_keys(self) -> list[Key]:
        """Every key, the oldest first."""
        columns = [t.keys.c[name] for name in Key.__slots__]
        with self.reading() as c:
            return [Key(**row._mapping) for row in c.execute(sa.select(*columns).order_by(t.keys.c.created_at))]

    def revoke(self, id_or_name: str) -> Key:
        """End a key; requests with it are refused from now on."""
        key = self.key(id_or_name)
        with self.writing() as c:
            c.execute(sa.update(t.keys).where(t.keys.c.id == key.id).values(revoked_at=time.time()))
        return self.key(key.id)

    def find_key(self, secret: str) -> Key | None:
        """The key of a secret that a client sent, unless it is revoked."""
        digest = _digest(secret)
        with self.reading() as c:
            row = c.execute(sa.select(t.keys).where(t.keys.c.sha256 == digest)).first()
        if row is None or not hmac.compare_digest(row.sha256, digest) or row.revoked_at is not None:
            return None
        return Key(**{name: getattr(row, name) for name in Key.__slots__})

    # Budgets

    def set_budget(self, key_id: str, period: Period, unit: Unit, amount: int | None) -> None:
        """Limit what a key spends in a period; None for no limit."""
        if amount is not None and not 0 <= amount < 2**63:
            raise ConfigError(f"budget: {amount} must be from 0 to 2**63 - 1")
        at = (t.budgets.c.key_id == key_id) & (t.budgets.c.period == period) & (t.budgets.c.unit == unit)
        with self.writing() as c:
            c.execute(sa.delete(t.budgets).where(at))
            if amount is not None:
                c.execute(sa.insert(t.budgets).values(key_id=key_id, period=period, unit=unit, amount=amount))

    def budgets(self, key_id: str) -> list[dict[str, Any]]:
        """Each budget of a key, with what is spent and reserved of it."""
        with self.reading() as c:
            result = []
            for row in c.execute(sa.select(t.budgets).where(t.budgets.c.key_id == key_id)).all():
                spent = c.execute(sa.select(t.spending).where(*_place(key_id, _start(row.period), row.unit))).first()
                result.append(
                    {
                        "period": row.period,
                        "unit": row.unit,
                        "amount": row.amount,
                        "spent": spent.settled if spent else 0,
                        "reserved": spent.reserved if spent else 0,
                    }
                )
            return result

    def reserve(self, reservation_id: str, key_id: str, most: Mapping[Unit, int | None]) -> bool:
        """Set aside the most that a request may spend. Raises OverBudgetError; False where the key has no budget.

        most: of each unit; None where it is not known: such a budget is then checked for being used up.
        """
        with self.writing() as c:
            limits = c.execute(sa.select(t.budgets).where(t.budgets.c.key_id == key_id)).all()
            taken: list[tuple[str, str, int]] = []
            for limit in limits:
                start, amount = _start(limit.period), most.get(limit.unit) or 0
                row = {"key_id": key_id, "start": start, "unit": limit.unit, "settled": 0, "reserved": 0}
                c.execute(insert(c, t.spending).values(**row).on_conflict_do_nothing())
                place = _place(key_id, start, limit.unit)
                used = t.spending.c.settled + t.spending.c.reserved
                done = c.execute(
                    sa.update(t.spending)
                    .where(*place, used + amount <= limit.amount, used < limit.amount)
                    .values(reserved=t.spending.c.reserved + amount)
                )
                if not done.rowcount:
                    now = c.execute(sa.select(used).where(*place)).scalar_one()
                    raise OverBudgetError(limit.period, limit.unit, limit.amount, limit.amount - now)
                taken.append((start, limit.unit, amount))
            if taken:
                c.execute(
                    sa.insert(t.reservations).values(
                        id=reservation_id, key_id=key_id, server_id=self.server_id, amounts=json.dumps(taken)
                    )
                )
            return bool(taken)

    def settle(self, reservation_id: str | None, entry: LedgerEntry) -> None:
        """Write what a request took into the ledger, and into its key's spending instead of what was reserved.

        A request is written once: a second line with its id changes nothing.
        """
        with self.writing() as c:
            line = insert(c, t.ledger).values(**_row(entry)).on_conflict_do_nothing().returning(t.ledger.c.id)
            is_new = c.execute(line).first() is not None
            held = None
            if reservation_id is not None:
                held = c.execute(sa.select(t.reservations).where(t.reservations.c.id == reservation_id)).first()
            if held is not None:
                _release(c, held)
            if not is_new or entry.key_id is None:
                return
            tokens = entry.prompt_tokens + entry.completion_tokens
            for limit in c.execute(sa.select(t.budgets).where(t.budgets.c.key_id == entry.key_id)).all():
                amount = tokens if limit.unit == "tokens" else entry.micro_usd or 0
                start = _start(limit.period)
                row = {"key_id": entry.key_id, "start": start, "unit": limit.unit, "settled": amount, "reserved": 0}
                more = {"settled": t.spending.c.settled + amount}
                c.execute(upsert(c, t.spending, row, ["key_id", "start", "unit"], more))

    def release(self, reservation_id: str) -> None:
        """Take back what a request that did not run had reserved."""
        with self.writing() as c:
            held = c.execute(sa.select(t.reservations).where(t.reservations.c.id == reservation_id)).first()
            if held is not None:
                _release(c, held)

    # The ledger

    def usage(self, by: Literal["key", "model", "day"] | None = None) -> list[dict[str, Any]]:
        """Sums over the ledger, by key, model or day (UTC); requests and idle time apart."""
        is_request = t.ledger.c.kind == "request"

        def total(column: Any, where: Any) -> Any:
            return sa.func.coalesce(sa.func.sum(sa.case((where, column), else_=0)), 0)

        names: dict[str, Any] = {
            "key": t.ledger.c.key_id,
            "model": t.ledger.c.model,
            "day": sa.cast(sa.func.floor(t.ledger.c.at / 86400), sa.BigInteger),
        }
        group = [names[by].label(by)] if by else []
        columns = [
            *group,
            total(1, is_request).label("requests"),
            *(
                total(t.ledger.c[name], is_request).label(name)
                for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "prefill_us", "decode_us")
            ),
            total(t.ledger.c.micro_usd, is_request).label("usage_micro_usd"),
            total(t.ledger.c.micro_usd, ~is_request).label("idle_micro_usd"),
            total(1, is_request & t.ledger.c.micro_usd.is_(None)).label("unpriced_requests"),
        ]
        query = sa.select(*columns)
        if group:
            query = query.group_by(names[by]).order_by(names[by])  # type: ignore[index]
        with self.reading() as c:
            rows = [dict(row._mapping) for row in c.execute(query)]
        known = {key.id: key.name for key in self.all_keys()}
        for row in rows:
            row |= {name: int(value) for name, value in row.items() if name != by and value is not None}
            row["allocation_micro_usd"] = row["usage_micro_usd"] + row["idle_micro_usd"]
            if by == "day":
                row["day"] = datetime.fromtimestamp(int(row["day"]) * 86400, UTC).date().isoformat()
            if by == "key":
                row["name"] = known.get(row["key"])
        return rows

    def uses(self, since: float | None = None, until: float | None = None) -> Uses:
        """The ledger by key and model between two times, seconds since 1970; None: from its first line, to its last.

        A line belongs to the time that it was written, at the end of what it tells.
        """
        line = t.ledger.c
        within = [] if since is None else [line.at >= since]
        within += [] if until is None else [line.at < until]
        is_request, is_unpriced = line.kind == "request", sa.case((line.micro_usd.is_(None), 1), else_=0)
        sums = [
            sa.func.count().label("requests"),
            *(sa.func.sum(line[name]).label(name) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")),
            sa.func.coalesce(sa.func.sum(line.micro_usd), 0).label("micro_usd"),
            sa.func.sum(is_unpriced).label("unpriced"),
        ]
        requests = sa.select(line.key_id, line.model, *sums).where(is_request, *within)
        idle = sa.select(sa.func.coalesce(sa.func.sum(line.micro_usd), 0)).where(~is_request, *within)
        with self.reading() as c:
            found = c.execute(requests.group_by(line.key_id, line.model).order_by(line.key_id, line.model)).all()
            idle_micro_usd = int(c.execute(idle).scalar_one())
            took = (line.prefill_us + line.decode_us) / 1e6
            first, last = c.execute(sa.select(sa.func.min(line.at - took), sa.func.max(line.at)).where(*within)).one()
        names = {key.id: key.name for key in self.all_keys()}
        uses = tuple(
            Use(
                key=row.key_id,
                name=names.get(row.key_id),
                model=row.model,
                **{name: int(getattr(row, name)) for name in _SUMMED},
            )
            for row in found
        )
        start, end = (first if since is None else since), (last if until is None else until)
        return Uses(uses=uses, idle_micro_usd=idle_micro_usd, start=start, end=end)

    # Responses, files, batches

    def put_response(self, response_id: str, key_id: str | None, expires_at: float, body: Any, messages: Any) -> None:
        """Keep a response and the conversation that it ends; what has expired goes."""
        with self.writing() as c:
            c.execute(sa.delete(t.responses).where(t.responses.c.expires_at < time.time()))
            row = {"id": response_id, "key_id": key_id, "expires_at": expires_at}
            c.execute(sa.insert(t.responses).values(**row, body=json.dumps(body), messages=json.dumps(messages)))

    def response(self, response_id: str, key_id: str | None) -> tuple[Any, Any] | None:
        """A response of this key, and its conversation."""
        owner = t.responses.c.key_id.is_(None) if key_id is None else t.responses.c.key_id == key_id
        with self.reading() as c:
            row = c.execute(
                sa.select(t.responses).where(
                    t.responses.c.id == response_id, owner, t.responses.c.expires_at >= time.time()
                )
            ).first()
        return None if row is None else (json.loads(row.body), json.loads(row.messages))

    def delete_response(self, response_id: str, key_id: str | None) -> bool:
        """Forget a response."""
        owner = t.responses.c.key_id.is_(None) if key_id is None else t.responses.c.key_id == key_id
        with self.writing() as c:
            return bool(c.execute(sa.delete(t.responses).where(t.responses.c.id == response_id, owner)).rowcount)

    def put_line(self, batch_id: str, line: int, *, ok: bool, result: Any) -> None:
        """Keep the answer to a line of a batch; the first one stays."""
        row = {"batch_id": batch_id, "line": line, "ok": int(ok), "result": json.dumps(result)}
        with self.writing() as c:
            c.execute(insert(c, t.batch_lines).values(**row).on_conflict_do_nothing())


def _digest(secret: str) -> str:
    """Secrets are 256 random bits, so one round of SHA-256 is enough: nothing can be guessed."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _start(period: str) -> str:
    now = datetime.now(UTC)
    return {"day": now.date().isoformat(), "month": f"{now:%Y-%m}"}.get(period, "total")


def _place(key_id: str, start: str, unit: str) -> tuple[Any, ...]:
    return (t.spending.c.key_id == key_id, t.spending.c.start == start, t.spending.c.unit == unit)


def _release(connection: sa.Connection, row: Any) -> None:
    for start, unit, amount in json.loads(row.amounts):
        connection.execute(
            sa.update(t.spending)
            .where(*_place(row.key_id, start, unit))
            .values(reserved=t.spending.c.reserved - amount)
        )
    connection.execute(sa.delete(t.reservations).where(t.reservations.c.id == row.id))


def _row(entry: LedgerEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in LedgerEntry.__slots__ if name != "version"}
