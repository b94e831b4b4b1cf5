"""The controller's durable state: SQLite (WAL) by default, PostgreSQL when grown up."""
