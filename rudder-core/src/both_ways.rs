//! Conversions between structs that have the same fields and are kept apart on purpose.

/// Implements `From` in both directions for structs whose fields have the same names; fields after `each` are lists whose elements
/// are converted, and fields after `into` are converted themselves.
macro_rules! both_ways {
    ($record:ident = $noun:ident { $($same:ident),* $(; each $($list:ident),*)? $(; into $($one:ident),*)? }) => {
        both_ways!(@one $record, $noun, [$($same)*], [$($($list)*)?], [$($($one)*)?]);
        both_ways!(@one $noun, $record, [$($same)*], [$($($list)*)?], [$($($one)*)?]);
    };
    (@one $from:ident, $to:ident, [$($same:ident)*], [$($list:ident)*], [$($one:ident)*]) => {
        impl From<$from> for $to {
            fn from($from { $($same,)* $($list,)* $($one,)* }: $from) -> Self {
                Self {
                    $($same,)*
                    $($list: $list.into_iter().map(Into::into).collect(),)*
                    $($one: $one.into(),)*
                }
            }
        }
    };
}
pub(crate) use both_ways;
