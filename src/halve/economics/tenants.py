"""Margin by tenant and by model from the lines of a ledger: who pays for what, to the micro-dollar.

A tenant is a key of the server, a model is what its requests named: the base, or an adapter under a name of its own.
The ledger's requests carry their share of the machine; idle time is the machine's, whatever models it holds, and is
spread over everyone in proportion to what they used, so that all shares add up to what was paid.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from halve.economics.api_prices import MTOK
from halve.economics.product import SECONDS_PER_MONTH, Product, Tenant

MICRO = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """Sums over the ledger's requests of one key and model. key, name: None for requests without a key.

    micro_usd: of the priced ones; unpriced: how many have no price.
    """

    key: str | None
    name: str | None
    model: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    micro_usd: int
    unpriced: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """A tenant, or a model. usage_micro_usd: its requests; idle_micro_usd: its part of idle time.

    revenue_usd, other_usd: of the stretch of time; None for a tenant that the product doesn't name. cost_known: False
    where a request has no price, so that costs are at least what is told.
    """

    name: str
    requests: int
    tokens: int
    usage_micro_usd: int
    idle_micro_usd: int
    cost_known: bool
    revenue_usd: Decimal | None
    other_usd: Decimal | None

    @property
    def token_usd(self) -> Decimal:
        """Usage + idle."""
        return Decimal(self.usage_micro_usd + self.idle_micro_usd) / MICRO

    @property
    def usd_per_mtok(self) -> Decimal | None:
        """Usage + idle over its tokens, by the million; None without tokens or with unpriced requests."""
        return self.token_usd * MTOK / self.tokens if self.tokens and self.cost_known else None

    @property
    def contribution_usd(self) -> Decimal | None:
        """Revenue - tokens - other costs of its seats and payments; None where one of them is not known."""
        if self.revenue_usd is None or self.other_usd is None or not self.cost_known:
            return None
        return self.revenue_usd - self.token_usd - self.other_usd

    @property
    def margin(self) -> Decimal | None:
        """Contribution / revenue."""
        if self.contribution_usd is None or not self.revenue_usd:
            return None
        return self.contribution_usd / self.revenue_usd


@dataclass(frozen=True, kw_only=True, slots=True)
class Books:
    """Accounts of a stretch of time. missing: tenants of the product that the ledger has no request of."""

    seconds: Decimal
    tenants: tuple[Account, ...]
    models: tuple[Account, ...]
    missing: tuple[str, ...]

    @property
    def total_micro_usd(self) -> int:
        """All that was paid."""
        return sum(a.usage_micro_usd + a.idle_micro_usd for a in self.tenants)


def spread(amount: int, weights: Sequence[int]) -> list[int]:
    """Whole parts of an amount in proportion to weights, which add up to it: the largest remainders get what is left.

    10 over weights 1, 1, 1: 4, 3, 3. Of weights that are all 0 the parts are 0.
    """
    total = sum(weights)
    if not total:
        return [0] * len(weights)
    parts = [amount * weight // total for weight in weights]
    rest = sorted(range(len(weights)), key=lambda i: (-(amount * weights[i] % total), i))
    for i in rest[: amount - sum(parts)]:
        parts[i] += 1
    return parts


def keep_books(product: Product, uses: Sequence[Use], idle_micro_usd: int, seconds: Decimal) -> Books:
    """Accounts of every tenant and model over so many seconds.

    A tenant's revenue is seats * price * seconds / seconds of a month:
    10 seats at 30 $ over a tenth of a month are 30 $. Other costs of seats and payment fees go along; the fixed costs
    of the product are nobody's and stay out. A model's revenue is the tenants', each by its tokens there.
    """
    month = seconds / SECONDS_PER_MONTH
    weights = [use.micro_usd for use in uses]
    if not sum(weights):  # unpriced, or too little to have a price: by tokens
        weights = [use.prompt_tokens + use.completion_tokens for use in uses]
    shares = spread(idle_micro_usd, weights)
    tenants = _group(uses, shares, [use.name or use.key or "" for use in uses])
    known = {name: product.tenants.get(name) for name in tenants}
    revenue = {name: _revenue(product, tenant, month) for name, tenant in known.items()}
    accounts = [_account(name, group, uses, shares, *revenue[name]) for name, group in tenants.items()]
    models = []
    for model, group in _group(uses, shares, [use.model for use in uses]).items():
        parts_of = [_part(uses[i], tenants, uses, revenue) for i in group]
        whole = all(part is not None for part in parts_of)
        sums = [sum((part[k] for part in parts_of if part), Decimal(0)) if whole else None for k in (0, 1)]
        models.append(_account(model, group, uses, shares, sums[0], sums[1]))
    return Books(
        seconds=seconds,
        tenants=tuple(sorted(accounts, key=_dearest)),
        models=tuple(sorted(models, key=_dearest)),
        missing=tuple(sorted(product.tenants.keys() - tenants.keys())),
    )


def _dearest(account: Account) -> tuple[int, str]:
    return -(account.usage_micro_usd + account.idle_micro_usd), account.name


def _group(uses: Sequence[Use], shares: Sequence[int], names: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        groups[name].append(i)
    return groups


def _revenue(product: Product, tenant: Tenant | None, month: Decimal) -> tuple[Decimal | None, Decimal | None]:
    """Revenue and other costs of a tenant in the time; None for one that isn't named."""
    if tenant is None:
        return None, None
    revenue = tenant.seats * tenant.usd_per_seat * month
    return revenue, tenant.seats * product.other_usd_per_seat * month + revenue * product.payment_share


def _part(
    use: Use,
    tenants: Mapping[str, Sequence[int]],
    uses: Sequence[Use],
    revenue: Mapping[str, tuple[Decimal | None, Decimal | None]],
) -> tuple[Decimal, Decimal] | None:
    """Of a tenant's revenue and other costs, the part by its tokens on this model."""
    name = use.name or use.key or ""
    whole, other = revenue[name]
    if whole is None or other is None:
        return None
    total = sum(uses[i].prompt_tokens + uses[i].completion_tokens for i in tenants[name])
    share = Decimal(use.prompt_tokens + use.completion_tokens) / total if total else Decimal(0)
    return whole * share, other * share


def _account(
    name: str,
    group: Sequence[int],
    uses: Sequence[Use],
    shares: Sequence[int],
    revenue: Decimal | None,
    other: Decimal | None,
) -> Account:
    mine = [uses[i] for i in group]
    return Account(
        name=name,
        requests=sum(use.requests for use in mine),
        tokens=sum(use.prompt_tokens + use.completion_tokens for use in mine),
        usage_micro_usd=sum(use.micro_usd for use in mine),
        idle_micro_usd=sum(shares[i] for i in group),
        cost_known=not any(use.unpriced for use in mine),
        revenue_usd=revenue,
        other_usd=other,
    )
