//! Errors of hypercalls, negative as they are returned (public/errno.h).

pub const NOENT: i64 = -2;
pub const FAULT: i64 = -14;
pub const EXIST: i64 = -17;
pub const INVAL: i64 = -22;
pub const NOSPC: i64 = -28;
pub const TIME: i64 = -62;
