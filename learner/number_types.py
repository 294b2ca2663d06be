"""Types of numbers in settings."""

from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
