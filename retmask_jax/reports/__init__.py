"""Results to pictures and pages. Nothing here touches a model."""
