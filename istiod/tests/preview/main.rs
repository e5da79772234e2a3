//! What a change would do to proxies, told before it is committed.

#[cfg(test)]
mod foretold;
