//! Saved states of devices in Rust, as dictionaries of numbers.

/// A dictionary with the fields of a state, made of one and made into one.
macro_rules! saved_state {
    ($dictionary:ident of $state:ty { $($field:ident: $kind:ty),+ $(,)? }) => {
        #[derive(pyo3::FromPyObject, pyo3::IntoPyObject)]
        #[pyo3(from_item_all)]
        struct $dictionary { $($field: $kind),+ }

        impl From<$state> for $dictionary {
            fn from(state: $state) -> Self {
                Self { $($field: state.$field),+ }
            }
        }

        impl From<$dictionary> for $state {
            fn from(dictionary: $dictionary) -> Self {
                Self { $($field: dictionary.$field),+ }
            }
        }
    };
}

pub(crate) use saved_state;
