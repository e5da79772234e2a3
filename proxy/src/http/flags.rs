//! Response flags: who or what ended a request, in Envoy's vocabulary.

/// A set of response flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flags(u32);

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $short:literal;)*) => {
        impl Flags {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*
        }

        /// Each flag with its short name, in the order in which they are printed.
        const NAMES: &[(Flags, &str)] = &[$((Flags::$name, $short)),*];
    };
}

flags! {
    /// No healthy upstream host.
    NO_HEALTHY_UPSTREAM = 1, "UH";
    /// The upstream connection failed.
    UPSTREAM_CONNECTION_FAILURE = 5, "UF";
    /// A circuit breaker is open.
    UPSTREAM_OVERFLOW = 7, "UO";
    /// No route for the request.
    NO_ROUTE = 8, "NR";
    /// The upstream request timed out.
    UPSTREAM_TIMEOUT = 2, "UT";
    /// The upstream reset the stream.
    UPSTREAM_RESET = 4, "UR";
    /// The upstream closed the connection.
    UPSTREAM_TERMINATION = 6, "UC";
    /// The request was reset here.
    LOCAL_RESET = 3, "LR";
    /// A fault delayed the request.
    DELAY_INJECTED = 9, "DI";
    /// A fault answered the request.
    FAULT_INJECTED = 10, "FI";
    /// A rate limit answered the request.
    RATE_LIMITED = 11, "RL";
    /// An authorization service or a token check answered the request.
    UNAUTHORIZED = 12, "UAEX";
    /// The client went away.
    DOWNSTREAM_TERMINATION = 14, "DC";
    /// All allowed attempts failed.
    RETRY_LIMIT = 15, "URX";
    /// Nothing moved on the stream for too long.
    STREAM_IDLE = 16, "SI";
    /// The client broke the protocol.
    DOWNSTREAM_PROTOCOL = 18, "DPE";
    /// The connection or stream was there longer than allowed.
    MAX_DURATION = 20, "DT";
    /// The upstream cluster is not known.
    NO_CLUSTER = 22, "NC";
    /// The upstream broke the protocol.
    UPSTREAM_PROTOCOL = 23, "UPE";
}

impl Flags {
    /// No flag.
    pub const NONE: Self = Self(0);

    /// Adds flags.
    pub fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Takes flags away.
    pub fn remove(&mut self, other: Self) {
        self.0 &= !other.0;
    }

    /// Whether all of `other` are set.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether none is set.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The short names, joined by commas; `-` when there is none.
    #[must_use]
    pub fn text(self) -> String {
        if self.is_empty() {
            return "-".to_owned();
        }
        self.names().collect::<Vec<_>>().join(",")
    }

    /// The short names.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.iter().filter(move |(flag, _)| self.contains(*flag)).map(|(_, name)| *name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_print_their_short_names() {
        let mut flags = Flags::NONE;
        assert_eq!(flags.text(), "-");
        flags.insert(Flags::RETRY_LIMIT);
        flags.insert(Flags::UPSTREAM_CONNECTION_FAILURE);
        assert_eq!(flags.text(), "UF,URX");
        flags.remove(Flags::RETRY_LIMIT);
        assert_eq!(flags.text(), "UF");
    }
}
