"""As it was a season ago, or just now."""

from collections.abc import Sequence

from rota.base.errors import ConfigError


class SeasonalNaive:
    """Each value is that of one season before; until a season has passed, the last value. The yardstick of any
    forecast: Seagull found it hard to beat for stable servers. Costs nothing."""

    def __init__(self, *, season_bins: int = 1440) -> None:
        """`season_bins` is a season's length: a day of minutes by default."""
        if season_bins < 1:
            raise ConfigError(f"season_bins must be at least 1, not {season_bins}")
        self._season = season_bins

    def forecast(self, history: Sequence[float], num_ahead: int) -> Sequence[float]:
        if not history:
            raise ValueError("there is no history")
        if len(history) < self._season:
            return [history[-1]] * num_ahead
        season = history[-self._season :]
        return [season[number % self._season] for number in range(num_ahead)]
