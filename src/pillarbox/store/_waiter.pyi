from pillarbox.store.waiter import Waiter as Waiter
from pillarbox.store.waiter import gather as gather
from pillarbox.store.waiter import wake as wake
