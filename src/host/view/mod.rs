//! What people see in a terminal of migrations, guests and checks.

#[cfg(test)]
pub(in crate::host) mod sample;
