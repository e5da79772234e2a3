//! What the raft crate logs, as tracing events.

use std::fmt::Write as _;

use slog::{Drain, KV, Level, Logger, Never, OwnedKVList, Record, Serializer};

/// A logger for the raft crate. Its changes of state are told by the driver, so what it says itself is detail.
pub(super) fn logger() -> Logger {
    Logger::root(Tracing, slog::o!())
}

struct Tracing;

impl Drain for Tracing {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        let mut fields = Fields(String::new());
        // The text is only for people; a value that cannot be shown is left out.
        if record.kv().serialize(record, &mut fields).and(values.serialize(record, &mut fields)).is_err() {
            fields.0.push_str(" ..");
        }
        let (message, fields) = (record.msg(), fields.0);
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "raft", fields, "{message}"),
            Level::Warning => tracing::warn!(target: "raft", fields, "{message}"),
            Level::Info | Level::Debug => tracing::debug!(target: "raft", fields, "{message}"),
            Level::Trace => tracing::trace!(target: "raft", fields, "{message}"),
        }
        Ok(())
    }
}

struct Fields(String);

impl Serializer for Fields {
    fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        write!(self.0, " {key}={value}").map_err(slog::Error::from)
    }
}
