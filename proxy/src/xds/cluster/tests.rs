//! Tables of what is taken and what is refused.
