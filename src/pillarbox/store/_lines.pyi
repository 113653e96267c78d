from pillarbox.store.plain import records as records
